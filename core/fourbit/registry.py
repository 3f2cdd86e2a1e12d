"""What is registered, and who was left out and why: the one state that `plugins` fills and `dispatch` reads.

All that is known stands in one `State`, which is never changed but replaced, by one assignment: an interrupt
between any two statements leaves the old state or the new one, and what `dispatch` resolves in a state is kept in
that state, so that it ends with it.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fourbit import isolation
from fourbit.backend import OPS, Backend, OpQuery
from fourbit.isolation import Fault, Registered
from fourbit.operations import Key

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
        loaded, loading: whether the plugins have been loaded, all of them; whether a thread, with the lock, is at it.
        entries: the ready backends, in the order in which they are asked.
        infos: of every backend that was found.
        forced: the `use_backend` blocks in force, the innermost last.
        tables: of each op the dispatch table: (device, dtype, blocksize, nested) to the method that runs it.
        resolutions, blocksizes: what else was worked out from the fields above.
    """

    loaded: bool = False
    loading: bool = False
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

lock = threading.RLock()
"""Held by whoever replaces the state; never while an op looks for its backend."""

pending: list[str] = []
"""Warnings that have not been given."""

_given: set[str] = set()


def change(make: Callable[[State], dict[str, Any]] = lambda now: {}) -> None:
    """Replace the state by one with the fields that `make(state)` returns, and with nothing resolved in it."""
    global state
    with lock:
        state = replace(state, **make(state))


def allowed_names() -> list[str] | None:
    """The names in FOURBIT_BACKENDS, in its order; None if it names none."""
    names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    return list(dict.fromkeys(names)) or None


def register(backend: Backend, *, source: str = "registered by the program") -> None:
    """Add a backend, as a plugin's hook does.

    One that does not fit is left out: a BackendWarning, and its reason in `fourbit.backends()`.
    """
    with lock:
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
            remember(BackendInfo(shown, kind, str(fault), source=source, traceback=trace))
            warn(f"backend {shown!r} from {source} {'failed and ' if cause else ''}is ignored: {fault}")
            return
        if missing is not None:
            remember(BackendInfo(entry.name, "unavailable", missing, entry.device_types, source=source))
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
    allowed = allowed_names()
    if allowed is None:
        return -entry.priority
    return allowed.index(entry.name) if entry.name in allowed else len(allowed)


def remember(info: BackendInfo) -> None:
    """List a backend that is not ready; one that tries again is listed once."""

    def stays(other: BackendInfo) -> bool:
        return other.state == "ready" or (other.name, other.source) != (info.name, info.source)

    change(lambda now: {"infos": (*filter(stays, now.infos), info)})


def warn(message: str) -> None:
    """Give a BackendWarning, once in a process; while plugins load, after the last of them."""
    if message not in _given and message not in pending:
        pending.append(message)
    if not state.loading:
        give_pending()


def give_pending() -> None:
    """Give the warnings that were held back."""
    while pending:
        message = pending.pop(0)
        _given.add(message)
        warnings.warn(message, BackendWarning, stacklevel=3)


def listing(now: State) -> str:
    """Every backend of a state, for an error: one a line, with its own state and the reason."""
    lines = [f"  {info.name}: {info.state} ({info.reason})" for info in now.infos]
    return "Backends:\n" + ("\n".join(lines) if lines else "  none")
