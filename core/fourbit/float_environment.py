"""Floating-point arithmetic in plain torch whose bits do not depend on which thread did it.

`torch.set_flush_denormal(True)` (subnormal numbers count as zero) sets the calling thread alone: torch's other threads
keep what they began with, so that a large tensor comes out flushed in one part and not in another. `subnormals_kept`
computes as if it had not been set. The native CPU kernels set each thread themselves, the rounding mode included.

Not covered, being torch's own: what it multiplies (`functional.linear` on a dequantized weight), and those threads of
its that began while flushing was on, for a caller that has turned it off again.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_LEAST_NORMAL, _HALF = sys.float_info.min, 0.5
_BODY = ctypes.PYFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)


@cache
def torch_parallel_for() -> Any:
    """The C function of that name of the torch that is loaded, called with the GIL held; None if it is not found."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll"):
        if (folder / name).exists():
            try:
                function = ctypes.PyDLL(str(folder / name)).torch_parallel_for
            except (OSError, AttributeError):
                return None
            function.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, _BODY, ctypes.c_void_p]
            function.restype = ctypes.c_int32
            return function
    return None


def flushes() -> bool:
    """Whether the calling thread takes subnormal numbers for zero; Python's own floats show it."""
    return _LEAST_NORMAL * _HALF == 0.0


def subnormals_kept(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A decorator: where the caller flushes, `function` runs with that off, and on the calling thread alone."""

    @wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not flushes():
            return function(*args, **kwargs)
        torch.set_flush_denormal(False)
        try:
            return _on_this_thread(lambda: function(*args, **kwargs))
        finally:
            torch.set_flush_denormal(True)

    return run


def _on_this_thread(work: Callable[[], Result]) -> Result:
    """Inside a parallel region of one piece, where torch shares nothing with its other threads."""
    parallel_for = torch_parallel_for()
    if parallel_for is None:
        return work()
    results: list[Result] = []
    errors: list[BaseException] = []

    def body(begin: int, end: int, context: Any) -> None:
        try:
            results.append(work())
        except BaseException as error:  # through C code it would be printed and lost
            errors.append(error)

    parallel_for(0, 1, 1, _BODY(body), None)
    if errors:
        raise errors[0]
    return results[0]
