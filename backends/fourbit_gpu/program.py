"""The text that a compiler gets for a kernel: its source and the headers that this includes, directly or not."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

from fourbit_gpu.spec import SHARED, KernelSpec

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def program(spec: KernelSpec) -> tuple[str, dict[str, str]]:
    """`(text, headers)` of the spec's source; headers by the name in `#include "name"`.

    A header lies in the folder `include` of the source's package or of `SHARED`. There are no others: the compilers'
    wheels bring no headers, so nothing is included with angle brackets.
    """
    return _program(spec.package, spec.source)


@cache
def _program(package: str, source: str) -> tuple[str, dict[str, str]]:
    text = (files(package) / "kernels" / source).read_text(encoding="utf-8")
    headers: dict[str, str] = {}
    waiting = _INCLUDE.findall(text)
    while waiting:
        name = waiting.pop()
        if name not in headers:
            headers[name] = header(name, package)
            waiting += _INCLUDE.findall(headers[name])
    return text, dict(sorted(headers.items()))


def header(name: str, package: str = SHARED) -> str:
    """The text of a header: the package's own, or the shared one. Raises FileNotFoundError."""
    own = files(package) / "include" / name
    return (own if own.is_file() else files(SHARED) / "include" / name).read_text(encoding="utf-8")
