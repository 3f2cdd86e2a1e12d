"""A stranger's backend at arm's length: what it says is checked and kept, what it raises stays its own fault.

Nothing outside this file reads an attribute of a backend twice or trusts what a method of it returned.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from fourbit.backend import API_CHANGE, API_VERSION, OPS, Backend, OpQuery, Support
from fourbit.checks import MAX_BLOCKSIZE, MIN_BLOCKSIZE

T = TypeVar("T")

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_SHOWN = 200  # characters of a stranger's value that a message repeats


class Fault(Exception):
    """What a backend did wrong; the cause is the exception that it raised, if it raised one."""


@dataclass(frozen=True)
class Registered:
    """A backend with what it said of itself when it was registered.

    Attributes:
        backend: the object, for calls of its methods.
        name, device_types, priority: its attributes then, whatever they say later.
        source: the distribution or module that it came from.
    """

    backend: Backend
    name: str
    device_types: tuple[str, ...]
    priority: float
    source: str

    def serves(self, device: torch.device) -> bool:
        """Whether `device` is of a type that it serves."""
        return "*" in self.device_types or device.type in self.device_types


def call(what: str, function: Callable[[], T]) -> T:
    """`function()`, which runs a stranger's code. Raises Fault, saying `what` raised, for anything but an interrupt.

    Also for exceptions that are no Exception: a Rust extension's panic, SystemExit, GeneratorExit.
    """
    try:
        return function()
    except (KeyboardInterrupt, Fault):
        raise
    except BaseException as error:
        raise Fault(f"{what} raised {describe_error(error)}") from error


def describe_error(error: BaseException) -> str:
    """An exception's type and text, also where its text cannot be had."""
    try:
        return f"{type(error).__name__}: {error}"
    except KeyboardInterrupt:
        raise
    except BaseException:
        return f"{type(error).__name__} (whose text cannot be had)"


def traceback_of(error: BaseException) -> str:
    """The full traceback of `error`."""
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


def show(value: object) -> str:
    """The value's repr, cut to a line's length; also of a value whose repr raises."""
    try:
        text = repr(value)
    except KeyboardInterrupt:
        raise
    except BaseException:
        text = object.__repr__(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


# ---- when it is registered ------------------------------------------------------------------------------


def instance(backend: object) -> object:
    """The backend itself, made if a class of backends is given. Raises Fault."""
    if issubclass(type(backend), type):
        kind: Any = backend
        if issubclass(kind, Backend):
            return call("its constructor", lambda: kind())
    return backend


def label(backend: object) -> str:
    """What messages call it before anything about it is known to be right."""
    try:
        name: object = call("its name", lambda: getattr(backend, "name", None))
    except Fault:
        name = None
    return name if type(name) is str else show(backend)


def examine(backend: object, source: str) -> Registered:
    """What the backend says of itself, read once and checked. Raises Fault."""
    return call("looking at it", lambda: _examine(backend, source))


def _examine(backend: object, source: str) -> Registered:
    if not issubclass(type(backend), Backend):  # not isinstance, which believes an object's __class__
        raise Fault(f"it is not an instance of fourbit.backend.Backend but of {type(backend).__name__}")
    assert isinstance(backend, Backend)

    def read(attribute: str) -> Any:
        return call(f"its {attribute}", lambda: getattr(backend, attribute, None))

    version = read("api_version")
    if type(version) is not int or version != API_VERSION:
        shown = version if isinstance(version, str) else show(version)
        change = f"; {API_CHANGE}" if version == API_VERSION - 1 else ""
        raise Fault(
            f"it is written for backend API version {shown}, and this fourbit has version {API_VERSION}{change}"
        )
    name = read("name")
    if type(name) is not str or not _NAME.fullmatch(name):
        raise Fault(f"its name {show(name)} is not a lower-case word")
    types = read("device_types")
    if type(types) is not tuple or not types or not all(type(each) is str and each for each in types):
        raise Fault(f"its device_types {show(types)} is not a tuple of torch device types such as ('cuda',)")
    priority = read("priority")
    if type(priority) not in (int, float) or priority != priority:
        raise Fault(f"its priority {show(priority)} is not a number")
    for method in (*OPS, "unavailable", "default_blocksize", "supports", "describe"):
        _check_signature(backend, method, read(method))
    return Registered(backend, name, types, priority, source)


def _check_signature(backend: Backend, name: str, method: object) -> None:
    """Raise Fault unless `method` takes what the contract passes to it, by position."""
    contract = getattr(Backend, name)
    if not callable(method):
        raise Fault(f"its {name} is {show(method)}, not a method")
    if getattr(method, "__func__", None) is contract:
        return
    try:
        own = inspect.signature(method)
    except (TypeError, ValueError):
        return  # of another language: nothing to compare
    wanted = list(inspect.signature(contract).parameters)[1:]
    try:
        own.bind(*wanted)
    except TypeError as error:
        raise Fault(f"its {name}{own} does not take ({', '.join(wanted)}): {error}") from None


def missing(entry: Registered) -> str | None:
    """What the backend says that this machine lacks, or None. Raises Fault."""
    reason: object = call("its unavailable()", lambda: entry.backend.unavailable())
    if reason is not None and type(reason) is not str:
        raise Fault(f"its unavailable() returned {show(reason)}, neither None nor the reason as a string")
    return reason if reason is None else reason or "it does not say why"


def first_default_blocksize(entry: Registered) -> int:
    """The default blocksize on the first of its device types; the others that torch has are asked too. Raises Fault."""
    sizes: list[int] = []
    for kind in entry.device_types:
        try:
            device = torch.device("cpu" if kind == "*" else kind)
        except RuntimeError as error:
            if not sizes:
                raise Fault(f"its device type {kind!r} is none of torch's") from error
            continue
        sizes.append(default_blocksize(entry, device))
    return sizes[0]


# ---- later ----------------------------------------------------------------------------------------------


def default_blocksize(entry: Registered, device: torch.device) -> int:
    """The backend's blocksize for `device`. Raises Fault if that is none."""
    size: object = call(f"its default_blocksize({device})", lambda: entry.backend.default_blocksize(device))
    if type(size) is not int or not MIN_BLOCKSIZE <= size <= MAX_BLOCKSIZE or size & (size - 1):
        wanted = f"a power of two from {MIN_BLOCKSIZE} to {MAX_BLOCKSIZE}"
        raise Fault(f"its default_blocksize({device}) returned {show(size)}, not {wanted}")
    return size


def supports(entry: Registered, query: OpQuery) -> Support:
    """The backend's answer. Raises Fault if it raises; an answer that is none counts as a no."""
    answer: object = call("its supports()", lambda: entry.backend.supports(query))
    if type(answer) is not Support:
        return Support.no(f"its supports() returned {show(answer)}, not a Support")
    if type(answer.ok) is not bool or type(answer.reason) is not str:
        return Support.no(f"its supports() returned {show(answer)}, whose fields are not a bool and a string")
    return answer


def inherits(entry: Registered, op: str) -> bool:
    """Whether the backend leaves `op` to the base class. Raises Fault."""
    return call(f"its {op}", lambda: getattr(type(entry.backend), op) is getattr(Backend, op))


def method(entry: Registered, op: str) -> Callable[..., Any]:
    """The bound method that runs `op`. Raises Fault."""
    found: object = call(f"its {op}", lambda: getattr(entry.backend, op))
    if not callable(found):
        raise Fault(f"its {op} is {show(found)}, not a method")
    return found


def describe(entry: Registered, query: OpQuery, shape: Sequence[int]) -> str:
    """The backend's own words on how it runs `query`. Raises Fault if there are none."""
    words: object = call("its describe()", lambda: entry.backend.describe(query, shape))
    if type(words) is not str:
        raise Fault(f"its describe() returned {show(words)}, not a string")
    return words
