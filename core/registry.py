"""Finds backends, and decides which one runs an op: plugin loading, the dispatch table, who was rejected and why.

Hooks run once, at load. What runs an op is decided once for each (op, device, dtype, blocksize, double
quantization) and kept in a dict; registering, unregistering and `use_backend` clear it.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from fourbit.backend import API_VERSION, OPS, SUPPORTED, Backend, OpQuery, Support

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "fourbit.backends"


class BackendWarning(RuntimeWarning):
    """A backend plugin could not be used. `fourbit.backends()` has the details."""


class NoBackendError(RuntimeError):
    """No loaded backend can run an op; the message lists each one and its reason."""


@dataclass(frozen=True)
class BackendInfo:
    """One line of `fourbit.backends()`.

    Attributes:
        name: of the backend, or of the entry point if it never got as far as a backend.
        state: "ready"; "unavailable" (it said that this machine lacks something); "failed" (an exception;
            see `traceback`); "rejected" (wrong API version, duplicate name, not a Backend); or "disabled" (by
            FOURBIT_BACKENDS).
        reason: why it is in that state.
        device_types: the torch device types it serves.
        default_blocksize: of its first device type; None unless ready.
        source: the distribution or module that it came from.
        traceback: the full traceback of a failure, else "".
    """

    name: str
    state: str
    reason: str
    device_types: tuple[str, ...] = ()
    default_blocksize: int | None = None
    source: str = ""
    traceback: str = field(default="", repr=False)


@dataclass(frozen=True)
class Resolution:
    """What runs an op: the backend, its method, and why the backends asked before it do not."""

    query: OpQuery
    backend: Backend
    rejected: tuple[tuple[str, str], ...]

    @property
    def run(self) -> Callable[..., Any]:
        """The bound method."""
        method: Callable[..., Any] = getattr(self.backend, self.query.op)
        return method


Key = tuple[torch.device, torch.dtype, int, bool]

_lock = threading.RLock()
_loaded = False
_loading = False
_backends: dict[str, Backend] = {}
_infos: dict[str, BackendInfo] = {}
_warnings: dict[str, bool] = {}  # message to whether it has been given
_forced: list[str] = []
_resolutions: dict[OpQuery, Resolution] = {}
_tables: dict[str, dict[Key, Callable[..., Any]]] = {op: {} for op in OPS}


def table(op: str) -> dict[Key, Callable[..., Any]]:
    """The live dispatch table of `op`: (device, dtype, blocksize, double_quant) to the method that runs it."""
    return _tables[op]


# ---- loading ------------------------------------------------------------------------------------------


def load_plugins() -> None:
    """Import the plugins of the entry-point group and run their hooks; does nothing the second time."""
    global _loaded, _loading
    if _loaded:
        return
    with _lock:
        if _loaded or _loading:  # a plugin may call back into fourbit while it loads
            return
        _loading = True
        try:
            for entry_point in _entry_points():
                _load_plugin(entry_point)
        finally:
            _loading, _loaded = False, True
    # last, since a filter may turn a warning into an exception, which must not cost the plugins after it
    _flush_warnings()


def _entry_points() -> list[EntryPoint]:
    """The group's entry points: fourbit's own first, as FOURBIT_BACKENDS restricts and orders them."""
    from importlib.metadata import entry_points

    def builtin_first(ep: EntryPoint) -> tuple[bool, str, str]:
        return (not ep.value.split(":")[0].startswith("fourbit."), ep.name, ep.value)

    found = sorted(entry_points(group=ENTRY_POINT_GROUP), key=builtin_first)
    allowed = _allowed_names()
    if allowed is None:
        return found
    for name in allowed:
        if name not in {ep.name for ep in found}:
            _warn(f"FOURBIT_BACKENDS names {name!r}, which is not installed")
    for ep in found:
        if ep.name not in allowed:
            reason = f"not in FOURBIT_BACKENDS={os.environ['FOURBIT_BACKENDS']}"
            _remember(BackendInfo(ep.name, "disabled", reason, source=_source(ep)))
    return [ep for name in allowed for ep in found if ep.name == name]


def _allowed_names() -> list[str] | None:
    value = os.environ.get("FOURBIT_BACKENDS", "")
    names = [name.strip() for name in value.split(",") if name.strip()]
    return list(dict.fromkeys(names)) or None


def _source(ep: EntryPoint) -> str:
    dist = getattr(ep, "dist", None)
    return f"{dist.name} {dist.version} ({ep.value})" if dist is not None else ep.value


def _load_plugin(ep: EntryPoint) -> None:
    """Import one plugin and call its hooks by itself, so that what it breaks stays its own."""
    import pluggy

    from fourbit import codebooks, hookspecs

    source = _source(ep)
    before = set(_backends)
    try:
        manager = pluggy.PluginManager("fourbit")
        manager.add_hookspecs(hookspecs)
        manager.register(ep.load(), name=ep.name)
        manager.check_pending()
        manager.hook.fourbit_register_codebooks(register=codebooks.register)
        manager.hook.fourbit_register_backends(register=lambda backend: register(backend, source=source))
    except (Exception, SystemExit) as error:
        for name in set(_backends) - before:  # half a plugin is none
            unregister(name)
        reason = f"{type(error).__name__}: {error}"
        _remember(BackendInfo(ep.name, "failed", reason, source=source, traceback=traceback.format_exc()))
        _warn(f"backend plugin {ep.name!r} from {source} failed to load and is ignored: {reason}")


def register(backend: Backend, *, source: str = "registered by the program") -> None:
    """Add a backend, as a plugin's hook does.

    One that does not fit is left out: a BackendWarning, and its reason in `fourbit.backends()`.
    """
    with _lock:
        if isinstance(backend, type) and issubclass(backend, Backend):
            backend = backend()
        name = getattr(backend, "name", None)
        shown = name if isinstance(name, str) else repr(backend)
        error = _misfit(backend)
        if error is not None:
            _remember(BackendInfo(shown, "rejected", error, source=source))
            _warn(f"backend {shown!r} from {source} is ignored: {error}")
            return
        try:
            missing = backend.unavailable()
            blocksize = backend.default_blocksize(torch.device(_first_type(backend)))
        except Exception as failure:
            reason = f"{type(failure).__name__}: {failure}"
            _remember(BackendInfo(shown, "failed", reason, source=source, traceback=traceback.format_exc()))
            _warn(f"backend {shown!r} from {source} failed and is ignored: {reason}")
            return
        info = BackendInfo(shown, "ready", "", tuple(backend.device_types), blocksize, source)
        if missing is not None:
            _remember(replace(info, state="unavailable", reason=missing, default_blocksize=None))
            return
        _remember(replace(info, reason=f"serves {', '.join(backend.device_types)}".replace("*", "any device")))
        _backends[shown] = backend
        clear_tables()


def unregister(name: str) -> None:
    """Take a backend out again. Raises KeyError if there is none of that name."""
    with _lock:
        del _backends[name]
        _infos.pop(name, None)
        clear_tables()


def _misfit(backend: object) -> str | None:
    """Why `backend` cannot be registered, or None."""
    if not isinstance(backend, Backend):
        return f"it is not an instance of fourbit.backend.Backend but of {type(backend).__name__}"
    version = getattr(backend, "api_version", None)
    if version != API_VERSION:
        return f"it is written for backend API version {version}, and this fourbit has version {API_VERSION}"
    name = getattr(backend, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", name):
        return f"its name {name!r} is not a lower-case word"
    if name in _backends:
        return f"the name {name!r} is taken already, by {_infos[name].source}"
    types = getattr(backend, "device_types", None)
    if not isinstance(types, tuple) or not types or not all(isinstance(t, str) and t for t in types):
        return f"its device_types {types!r} is not a tuple of torch device types such as ('cuda',)"
    return None


def _first_type(backend: Backend) -> str:
    return backend.device_types[0] if backend.device_types[0] != "*" else "cpu"


def _remember(info: BackendInfo) -> None:
    # the name belongs to the ready backend, which `unregister` takes out by it; others of that name have longer keys
    holder = _infos.get(info.name)
    if holder is not None and info.state != "ready":
        _infos[f"{info.name} from {info.source}"] = info
        return
    if holder is not None:
        _infos[f"{holder.name} from {holder.source}"] = holder
    _infos[info.name] = info


def _warn(message: str) -> None:
    """Give a BackendWarning, once in a process; while plugins load, after the last of them."""
    _warnings.setdefault(message, False)
    if not _loading:
        _flush_warnings()


def _flush_warnings() -> None:
    for message in [message for message, given in _warnings.items() if not given]:
        _warnings[message] = True
        warnings.warn(message, BackendWarning, stacklevel=3)


def backends() -> list[BackendInfo]:
    """Every backend that was found, in the order in which they are asked, with its state and the reason."""
    load_plugins()
    order = {b.name: i for i, b in enumerate(_candidates())}
    return sorted(_infos.values(), key=lambda info: (order.get(info.name, len(order)), info.name))


def get_backend(name: str) -> Backend:
    """The backend of that name. Raises NoBackendError, with the state of each, if it is not ready."""
    load_plugins()
    if name not in _backends:
        raise NoBackendError(f"backend {name!r} is not ready.\n{_listing()}")
    return _backends[name]


def _listing() -> str:
    lines = [f"  {info.name}: {info.state} ({info.reason})" for info in _infos.values()]
    return "Backends:\n" + ("\n".join(lines) if lines else "  none")


# ---- resolution ---------------------------------------------------------------------------------------


def _candidates() -> list[Backend]:
    """Ready backends, first to be asked first: FOURBIT_BACKENDS' order, else falling priority."""
    allowed = _allowed_names()
    if allowed is None:
        return sorted(_backends.values(), key=lambda b: -b.priority)
    return sorted(_backends.values(), key=lambda b: allowed.index(b.name) if b.name in allowed else len(allowed))


def resolve(query: OpQuery) -> Resolution:
    """The backend that runs `query`. Raises NoBackendError, listing every reason, if none does."""
    load_plugins()
    found = _resolutions.get(query)
    if found is not None:
        return found
    with _lock:
        found = _resolve(query)
        _resolutions[query] = found
        if os.environ.get("FOURBIT_TRACE", "0") not in ("", "0"):
            print(f"fourbit: {format_query(query)} -> {found.backend.name}{_why(found)}", file=sys.stderr)
        return found


def _resolve(query: OpQuery) -> Resolution:
    rejected: list[tuple[str, str]] = []
    forced = _forced[-1] if _forced else None
    for backend in _candidates():
        if forced is not None and backend.name != forced:
            rejected.append((backend.name, f"use_backend({forced!r}) is in force"))
            continue
        answer = ask(backend, query)
        if answer:
            return Resolution(query, backend, tuple(rejected))
        rejected.append((backend.name, answer.reason or "it does not support this"))
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in rejected)
    raise NoBackendError(f"no backend runs {format_query(query)}.{reasons}\n{_listing()}")


def ask(backend: Backend, query: OpQuery) -> Support:
    """Whether `backend` can run `query`, by its device types, its methods and its `supports`; never raises."""
    if "*" not in backend.device_types and query.device.type not in backend.device_types:
        return Support.no(f"serves {', '.join(backend.device_types)}, not {query.device.type}")
    if query.op in ("quantize_4bit", "dequantize_4bit") and getattr(type(backend), query.op) is getattr(
        Backend, query.op
    ):
        return Support.no("does not implement it")
    try:
        answer = backend.supports(query)
    except Exception as error:
        _warn(f"backend {backend.name!r}: supports() raised {type(error).__name__}: {error}; taken as a no")
        return Support.no(f"its supports() raised {type(error).__name__}: {error}")
    if not isinstance(answer, Support):
        return Support.no(f"its supports() returned {answer!r}, not a Support")
    if not answer or not _is_composed(backend, query.op):
        return answer
    # an inherited composition needs the op that it is composed of
    below = SUPPORTED
    if query.op in _COMPOSED_OF_DEQUANTIZE:
        below = ask(backend, replace(query, op="dequantize_4bit"))
    return below if below else Support.no(f"composed of dequantize_4bit, which it does not support: {below.reason}")


_COMPOSED_OF_DEQUANTIZE = tuple(op for op in OPS if op.startswith(("linear", "embedding", "grouped")))


def _is_composed(backend: Backend, op: str) -> bool:
    return getattr(type(backend), op) is getattr(Backend, op)


def miss(op: str, key: Key) -> Callable[..., Any]:
    """Fill the dispatch table for a key that is not in it; returns the method."""
    device, dtype, blocksize, double_quant = key
    run = resolve(OpQuery(op, device, dtype, blocksize, double_quant)).run
    _tables[op][key] = run
    return run


def clear_tables() -> None:
    """Forget what was resolved; the next call of each op asks again."""
    with _lock:
        _resolutions.clear()
        for each in _tables.values():
            each.clear()


def resolutions() -> list[Resolution]:
    """What has been resolved since the tables were last cleared: which backend ran each op."""
    return list(_resolutions.values())


def default_blocksize(device: torch.device) -> int:
    """The blocksize that `blocksize=None` stands for on `device`: its first quantizing backend's."""
    load_plugins()
    for backend in _candidates():
        if _forced and backend.name != _forced[-1]:
            continue
        size = backend.default_blocksize(device)
        if ask(backend, OpQuery("quantize_4bit", device, torch.float32, size)):
            return size
    raise NoBackendError(f"no backend quantizes on {device}.\n{_listing()}")


@contextmanager
def use_backend(name: str) -> Iterator[Backend]:
    """Run every op on the backend `name`, and on no other, inside the `with` block.

    An op that it cannot run raises NoBackendError instead of falling back. Process-wide rather than of one
    thread, since autograd runs backward passes on threads of its own. Raises NoBackendError at once if
    there is no such backend.
    """
    backend = get_backend(name)
    with _lock:
        _forced.append(name)
        clear_tables()
    try:
        yield backend
    finally:
        with _lock:
            _forced.reverse()
            _forced.remove(name)  # the innermost of that name, also where two threads' blocks overlap
            _forced.reverse()
            clear_tables()


def format_query(query: OpQuery) -> str:
    """`query` in words."""
    dtype = str(query.dtype).removeprefix("torch.")
    nested = ", double-quantized" if query.double_quant else ""
    return f"{query.op} on {query.device} ({dtype}, blocksize {query.blocksize}{nested})"


def _why(found: Resolution) -> str:
    return "".join(f"; not {name}: {reason}" for name, reason in found.rejected)
