"""The text that a compiler gets for a kernel: its source and the headers that this includes, directly or not."""

from __future__ import annotations

import re
from functools import cache

from fourbit_gpu.spec import read_source

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


@cache
def program(source: str) -> tuple[str, dict[str, str]]:
    """`(text, headers)` of a file in `backends/fourbit_gpu/kernels`; headers by the name in `#include "name"`.

    There are no others: the compilers' wheels bring no headers, so nothing is included with angle brackets.
    """
    text = read_source(source)
    headers: dict[str, str] = {}
    waiting = _INCLUDE.findall(text)
    while waiting:
        name = waiting.pop()
        if name not in headers:
            headers[name] = read_source(name)
            waiting += _INCLUDE.findall(headers[name])
    return text, dict(sorted(headers.items()))
