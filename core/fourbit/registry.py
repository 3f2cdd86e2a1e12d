"""Finds backends: plugin loading, what is registered, and who was left out and why.

Hooks run once, at load. All that is known stands in one `State`, which is never changed but replaced, by one
assignment: an interrupt between any two statements leaves the old state or the new one, and what `dispatch`
resolves in a state is kept in that state, so that it ends with it.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from fourbit import isolation
from fourbit.backend import OPS, Backend, OpQuery
from fourbit.isolation import Fault, Registered
from fourbit.operations import Key

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "fourbit.backends"
VARIABLE = "FOURBIT_BACKENDS"


class BackendWarning(RuntimeWarning):
    """A backend plugin could not be used. `fourbit.backends()` has the details."""


class NoBackendError(RuntimeError):
    """No loaded backend can run an op; the message lists each one and its reason."""


@dataclass(frozen=True)
class BackendInfo:
    """One line of `fourbit.backends()`.

    Attributes:
        name: of the backend, or of the entry point if it never got as far as a backend.
        state: "ready"; "unavailable" (it said that this machine lacks something); "failed" (an exception, see
            `traceback`, or FOURBIT_BACKENDS names it and it is not installed); "rejected" (wrong API version,
            duplicate name, not a Backend); or "disabled" (by FOURBIT_BACKENDS).
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
    """What runs an op: the backend, its method, and why the backends asked before it do not.

    Attributes:
        query: what was asked.
        entry: the backend as it was registered.
        run: its bound method.
        rejected: `(name, reason)` of each backend asked before it.
    """

    query: OpQuery
    entry: Registered
    run: Callable[..., Any] = field(repr=False)
    rejected: tuple[tuple[str, str], ...]

    @property
    def backend(self) -> Backend:
        """The backend itself."""
        return self.entry.backend


@dataclass(frozen=True, eq=False)
class Forced:
    """One `use_backend` block that is in force: the backend's name."""

    name: str


@dataclass(frozen=True)
class State:
    """All that is known at one moment.

    Attributes:
        loaded: whether the plugins have been loaded, all of them.
        entries: the ready backends, in the order in which they are asked.
        infos: of every backend that was found.
        forced: the `use_backend` blocks in force, the innermost last.
        tables: of each op the dispatch table: (device, dtype, blocksize, nested) to the method that runs it.
        resolutions, blocksizes: what else was worked out from the fields above.
    """

    loaded: bool = False
    entries: tuple[Registered, ...] = ()
    infos: tuple[BackendInfo, ...] = ()
    forced: tuple[Forced, ...] = ()
    # A new state begins with none of these.
    tables: dict[str, dict[Key, Callable[..., Any]]] = field(init=False, default_factory=lambda: {op: {} for op in OPS})
    resolutions: dict[OpQuery, Resolution] = field(init=False, default_factory=dict)
    blocksizes: dict[torch.device, int] = field(init=False, default_factory=dict)

    def entry(self, name: str) -> Registered | None:
        """The ready backend of that name."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        return None


state = State()
"""The present one. Whoever reads more than one thing of it takes it once."""

_lock = threading.RLock()  # held by whoever replaces the state; never while an op looks for its backend
_loading = False
_pending: list[str] = []  # warnings that have not been given
_given: set[str] = set()


def change(make: Callable[[State], dict[str, Any]] = lambda now: {}) -> None:
    """Replace the state by one with the fields that `make(state)` returns, and with nothing resolved in it."""
    global state
    with _lock:
        state = replace(state, **make(state))


# ---- loading ------------------------------------------------------------------------------------------


def load_plugins() -> None:
    """Import the plugins of the entry-point group and run their hooks; does nothing the second time.

    All or none: an interrupt passes through, and the next call loads them anew.
    """
    global state, _loading, _pending
    if state.loaded:
        return
    with _lock:
        if state.loaded or _loading:  # a plugin may call back into fourbit while it loads
            return
        before, pending = state, list(_pending)
        try:
            _loading = True
            for entry_point in _entry_points():
                _load_plugin(entry_point)
            change(lambda now: {"loaded": True})
        finally:
            # no call in here: Python handles an interrupt at calls and loops, and this must not be torn
            _loading = False
            if not state.loaded:
                state, _pending = before, pending
    # last, since a filter may turn a warning into an exception, which must not cost the plugins after it
    _give_pending()


def _entry_points() -> list[EntryPoint]:
    """The group's entry points: fourbit's own first, as FOURBIT_BACKENDS restricts and orders them."""
    from importlib.metadata import entry_points

    def builtin_first(ep: EntryPoint) -> tuple[bool, str, str]:
        return (not _is_own(ep), ep.name, str(ep.value))

    found = sorted(entry_points(group=ENTRY_POINT_GROUP), key=builtin_first)
    allowed = _allowed_names()
    if allowed is None:
        return found
    for name in allowed:
        if name not in {ep.name for ep in found}:
            _remember(BackendInfo(name, "failed", f"{VARIABLE} names it, and it is not installed", source=VARIABLE))
            warn(f"{VARIABLE} names {name!r}, which is not installed")
    for ep in found:
        if ep.name not in allowed:
            reason = f"not in {VARIABLE}={os.environ[VARIABLE]}"
            _remember(BackendInfo(ep.name, "disabled", reason, source=_source(ep)))
    return [ep for name in allowed for ep in found if ep.name == name]


def _allowed_names() -> list[str] | None:
    names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    return list(dict.fromkeys(names)) or None


def _is_own(ep: EntryPoint) -> bool:
    """Whether an entry point is of fourbit's own distribution."""
    try:
        return isolation.call("its metadata", lambda: ep.dist is not None and ep.dist.name == "fourbit")
    except Fault:
        return False


def _source(ep: EntryPoint) -> str:
    dist = getattr(ep, "dist", None)
    try:
        return isolation.call("its metadata", lambda: f"{dist.name} {dist.version} ({ep.value})" if dist else ep.value)
    except Fault:  # a distribution whose metadata is damaged
        return str(ep.value)


def _load_plugin(ep: EntryPoint) -> None:
    """Import one plugin and call its hooks by itself, so that what it breaks stays its own."""
    import pluggy

    from fourbit import codebooks, hookspecs

    source = _source(ep)
    before, known = state, codebooks.snapshot()
    try:
        manager = pluggy.PluginManager("fourbit")
        manager.add_hookspecs(hookspecs)
        manager.register(ep.load(), name=ep.name)
        manager.check_pending()
        manager.hook.fourbit_register_codebooks(register=codebooks.register)
        manager.hook.fourbit_register_backends(register=lambda backend: register(backend, source=source))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a Rust extension's panic and SystemExit are no Exceptions
        codebooks.restore(known)  # half a plugin is none
        change(lambda now: {"entries": before.entries, "infos": before.infos})
        reason, trace = isolation.describe_error(error), isolation.traceback_of(error)
        _remember(BackendInfo(ep.name, "failed", reason, source=source, traceback=trace))
        warn(f"backend plugin {ep.name!r} from {source} failed to load and is ignored: {reason}")


# ---- registering --------------------------------------------------------------------------------------


def register(backend: Backend, *, source: str = "registered by the program") -> None:
    """Add a backend, as a plugin's hook does.

    One that does not fit is left out: a BackendWarning, and its reason in `fourbit.backends()`.
    """
    with _lock:
        shown = isolation.label(backend)
        try:
            entry = isolation.examine(isolation.instance(backend), source)
            holder = state.entry(entry.name)
            if holder is not None:
                raise Fault(f"the name {entry.name!r} is taken already, by {holder.source}")
            missing = isolation.missing(entry)
            blocksize = None if missing is not None else isolation.first_default_blocksize(entry)
        except Fault as fault:
            cause = fault.__cause__
            kind, trace = ("rejected", "") if cause is None else ("failed", isolation.traceback_of(cause))
            _remember(BackendInfo(shown, kind, str(fault), source=source, traceback=trace))
            warn(f"backend {shown!r} from {source} {'failed and ' if cause else ''}is ignored: {fault}")
            return
        if missing is not None:
            _remember(BackendInfo(entry.name, "unavailable", missing, entry.device_types, source=source))
            return
        reason = f"serves {', '.join(entry.device_types)}".replace("*", "any device")
        info = BackendInfo(entry.name, "ready", reason, entry.device_types, blocksize, source)
        entries = tuple(sorted((*state.entries, entry), key=_place))
        change(lambda now: {"entries": entries, "infos": (*now.infos, info)})


def unregister(name: str) -> None:
    """Take a backend out again. Raises KeyError if there is none of that name."""

    def without(now: State) -> dict[str, Any]:
        if now.entry(name) is None:
            raise KeyError(name)
        return {
            "entries": tuple(entry for entry in now.entries if entry.name != name),
            "infos": tuple(info for info in now.infos if (info.name, info.state) != (name, "ready")),
        }

    change(without)


def _place(entry: Registered) -> float:
    """Where a backend stands, the least being asked first: FOURBIT_BACKENDS' order, else falling priority."""
    allowed = _allowed_names()
    if allowed is None:
        return -entry.priority
    return allowed.index(entry.name) if entry.name in allowed else len(allowed)


def _remember(info: BackendInfo) -> None:
    """List a backend that is not ready; one that tries again is listed once."""

    def stays(other: BackendInfo) -> bool:
        return other.state == "ready" or (other.name, other.source) != (info.name, info.source)

    change(lambda now: {"infos": (*filter(stays, now.infos), info)})


def warn(message: str) -> None:
    """Give a BackendWarning, once in a process; while plugins load, after the last of them."""
    if message not in _given and message not in _pending:
        _pending.append(message)
    if not _loading:
        _give_pending()


def _give_pending() -> None:
    while _pending:
        message = _pending.pop(0)
        _given.add(message)
        warnings.warn(message, BackendWarning, stacklevel=3)


# ---- asking -------------------------------------------------------------------------------------------


def backends() -> list[BackendInfo]:
    """Every backend that was found, in the order in which they are asked, with its state and the reason."""
    load_plugins()
    now = state
    order = {entry.name: i for i, entry in enumerate(now.entries)}
    return sorted(now.infos, key=lambda info: (order.get(info.name, len(order)), info.name))


def get_backend(name: str) -> Backend:
    """The backend of that name. Raises NoBackendError, with the state of each, if it is not ready."""
    load_plugins()
    now = state
    entry = now.entry(name)
    if entry is None:
        raise NoBackendError(f"backend {name!r} is not ready.\n{listing(now)}")
    return entry.backend


def listing(now: State) -> str:
    """Every backend of a state, for an error: one a line, with its own state and the reason."""
    lines = [f"  {info.name}: {info.state} ({info.reason})" for info in now.infos]
    return "Backends:\n" + ("\n".join(lines) if lines else "  none")
