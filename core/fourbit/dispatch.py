"""Decides which backend runs an op: once for each kind of input, then a table.

The answers are kept in the registry's state. Registering, unregistering and `use_backend` replace the state,
and with it the tables; whoever still works on the old one stores into the old one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from fourbit import isolation, registry
from fourbit.backend import SUPPORTED, Backend, OpQuery, Support
from fourbit.isolation import Fault, Registered
from fourbit.operations import OPERATIONS, Key
from fourbit.registry import Forced, NoBackendError, Resolution, State


def miss(op: str, key: Key) -> Callable[..., Any]:
    """Fill the dispatch table for a key that is not in it; returns the method."""
    registry.load_plugins()
    now = registry.state
    device, dtype, blocksize, nested = key
    run = _resolve_in(now, OpQuery(op, device, dtype, blocksize, nested)).run
    now.tables[op][key] = run  # the table of the state that was asked: no later one
    return run


def resolve(query: OpQuery) -> Resolution:
    """The backend that runs `query`. Raises NoBackendError, listing every reason, if none does."""
    registry.load_plugins()
    return _resolve_in(registry.state, query)


def _resolve_in(now: State, query: OpQuery) -> Resolution:
    found = now.resolutions.get(query)
    if found is not None:
        return found
    made = _search(now, query)
    found = now.resolutions.setdefault(query, made)  # two threads may have searched: one answer for both
    if found is made and os.environ.get("FOURBIT_TRACE", "0") not in ("", "0"):
        why = "".join(f"; not {name}: {reason}" for name, reason in found.rejected)
        print(f"fourbit: {format_query(query)} -> {found.entry.name}{why}", file=sys.stderr)
    return found


def _search(now: State, query: OpQuery) -> Resolution:
    rejected: list[tuple[str, str]] = []
    for entry, reason in _asked(now):
        if reason is not None:
            rejected.append((entry.name, reason))
            continue
        answer = _ask(entry, query)
        if answer:
            try:
                return Resolution(query, entry, isolation.method(entry, query.op), tuple(rejected))
            except Fault as fault:
                answer = Support.no(str(fault))
        rejected.append((entry.name, answer.reason or "it does not support this"))
    raise NoBackendError(f"no backend runs {format_query(query)}.{_lines(rejected)}\n{registry.listing(now)}")


def _asked(now: State) -> list[tuple[Registered, str | None]]:
    """Ready backends, first to be asked first, each with the reason why it may not be asked, if there is one."""
    forced = now.forced[-1].name if now.forced else None
    barred = f"use_backend({forced!r}) is in force"
    return [(entry, barred if forced not in (None, entry.name) else None) for entry in now.entries]


def _lines(rejected: Sequence[tuple[str, str]]) -> str:
    return "".join(f"\n  {name}: {reason}" for name, reason in rejected)


def ask(backend: Backend, query: OpQuery) -> Support:
    """Whether the registered `backend` can run `query`, by its device types, its methods and its `supports`.

    Never raises for what the backend does; LookupError for one that is not registered.
    """
    for entry in registry.state.entries:
        if entry.backend is backend:
            return _ask(entry, query)
    raise LookupError(f"{isolation.show(backend)} is not registered")


def _ask(entry: Registered, query: OpQuery) -> Support:
    if not entry.serves(query.device):
        return Support.no(f"serves {', '.join(entry.device_types)}, not {query.device.type}")
    try:
        inherited = isolation.inherits(entry, query.op)
        if inherited and OPERATIONS[query.op].composition is None:
            return Support.no("does not implement it")
        answer = isolation.supports(entry, query)
    except Fault as fault:
        registry.warn(f"backend {entry.name!r}: {str(fault).removeprefix('its ')}; taken as a no")
        return Support.no(str(fault))
    needs = OPERATIONS[query.op].needs if inherited else None
    if not answer or needs is None:
        return answer
    below = _ask(entry, replace(query, op=needs))
    return SUPPORTED if below else Support.no(f"composed of {needs}, which it does not support: {below.reason}")


def describe(found: Resolution, shape: Sequence[int]) -> str:
    """How the op runs, in the backend's own words; if it has none, why."""
    try:
        return isolation.describe(found.entry, found.query, shape)
    except Fault as fault:
        return f"not described: {fault}"


def clear_tables() -> None:
    """Forget what was resolved; the next call of each op asks again."""
    registry.change()


def resolutions() -> list[Resolution]:
    """What has been resolved since the tables were last cleared: which backend ran each op."""
    return list(registry.state.resolutions.values())


def default_blocksize(device: torch.device) -> int:
    """The blocksize that `blocksize=None` stands for on `device`: its first quantizing backend's."""
    registry.load_plugins()
    now = registry.state
    found = now.blocksizes.get(device)
    if found is None:
        found = now.blocksizes[device] = _default_blocksize(now, device)
    return found


def _default_blocksize(now: State, device: torch.device) -> int:
    rejected: list[tuple[str, str]] = []
    for entry, reason in _asked(now):
        if reason is None and not entry.serves(device):
            reason = f"serves {', '.join(entry.device_types)}, not {device.type}"
        if reason is None:
            try:
                size = isolation.default_blocksize(entry, device)
            except Fault as fault:
                registry.warn(f"backend {entry.name!r}: {str(fault).removeprefix('its ')}; it is passed over")
                reason = str(fault)
            else:
                answer = _ask(entry, OpQuery("quantize_4bit", device, torch.float32, size))
                if answer:
                    return size
                reason = answer.reason
        rejected.append((entry.name, reason))
    raise NoBackendError(f"no backend quantizes on {device}.{_lines(rejected)}\n{registry.listing(now)}")


@contextmanager
def use_backend(name: str) -> Iterator[Backend]:
    """Run every op on the backend `name`, and on no other, inside the `with` block.

    An op that it cannot run raises NoBackendError instead of falling back. Process-wide rather than of one
    thread, since autograd runs backward passes on threads of its own. Raises NoBackendError at once if
    there is no such backend.
    """
    backend = registry.get_backend(name)
    block = Forced(name)
    try:
        registry.change(lambda now: {"forced": (*now.forced, block)})
        yield backend
    finally:
        try:
            _end(block)
        finally:
            if block in registry.state.forced:  # an interrupt came
                _end(block)


def _end(block: Forced) -> None:
    registry.change(lambda now: {"forced": tuple(each for each in now.forced if each is not block)})


def format_query(query: OpQuery) -> str:
    """`query` in words."""
    dtype = str(query.dtype).removeprefix("torch.")
    nested = ", double-quantized" if query.nested else ""
    return f"{query.op} on {query.device} ({dtype}, blocksize {query.blocksize}{nested})"
