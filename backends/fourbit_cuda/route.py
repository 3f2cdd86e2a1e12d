"""Which of three ways a product takes: the fused kernel for few rows of x, that for many, or the weight decoded piece
by piece for torch's matmul. By models of their times; where there is no kernel for many rows, by a number of rows."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from functools import lru_cache

from fourbit_cuda import matmul, plan
from fourbit_cuda.tile import Shape
from fourbit_gpu.device import DeviceProps

Route = plan.Plan | matmul.Plan | None
"""None: pieces."""

FEW_ROWS = 128
"""Up to so many rows two passes of the kernel for few rows cost less than writing 16-bit weights to memory: where there
is no kernel for many."""


MANY_FROM = 32
"""Up to so many rows the kernel for few was faster than that for many on every shape measured, and the models of their
times are not exact enough to tell."""

MANY_PER_EXPERT = 8
"""From more rows an expert than this on the kernel for many was faster on every shape."""


@lru_cache(maxsize=4096)
def route(props: DeviceProps, shape: Shape) -> Route:
    """The way of a product with `shape.m` > 0 rows of x, of 16-bit floats or, by pieces alone, of float32."""
    many = matmul.plan_matmul(props, shape)
    most = FEW_ROWS
    if shape.experts:
        most = shape.experts * (plan.FUSED_ROWS if many is None else MANY_PER_EXPERT)
    few = plan.plan_linear(props, shape) if shape.m <= most and not shape.transposed else None
    if many is None:
        return few
    ways: list[tuple[float, Route]] = []
    if shape.experts or few is None or shape.m > MANY_FROM:
        ways.append((many[1], many[0]))
    if not shape.experts:
        ways.append((pieces_microseconds(props, shape), None))
    if few is not None:
        ways.append((few.microseconds, few))
    return min(ways, key=lambda way: way[0])[1]


def pieces_microseconds(props: DeviceProps, shape: Shape) -> float:
    """Estimated microseconds of decoding the weight and multiplying with torch's matmul."""
    weights = shape.n * shape.k
    bandwidth = (props.bandwidth or 15.0 * props.sm_count) * 1e3  # bytes a microsecond
    product = 2.0 * shape.m * weights / (props.sm_count * _FLOPS)
    written = 2.0 * weights * (1.0 if 4 * weights > props.l2_bytes else 0.4)  # bytes, of which the L2 cache keeps few
    memory = (written + 2.0 * shape.m * (shape.n + shape.k)) / (0.8 * bandwidth)
    decode = (written + weights * (0.5 + 4.0 / shape.blocksize)) / (0.84 * bandwidth)
    if shape.transposed:  # half of the columns at a time
        return _LAUNCHES + 1.12 * max(product, memory) + 1.1 * decode
    return _LAUNCHES + max(product, memory) + decode


_FLOPS = 6.2e6
"""Of torch's matmul, a multiprocessor and microsecond, as measured on an H100."""
_LAUNCHES = 7.0
"""Microseconds of a decoding and of torch's matmul that have nothing to do, fitted to a sweep. Where one launch takes
as long, it is the better way: half of the host's work."""


def describe(props: DeviceProps, shape: Shape) -> str:
    """The ways for all numbers of rows of x, one line."""

    def way(rows: int) -> tuple[str, str]:
        chosen = route(props, replace(shape, m=rows))
        if chosen is None:
            return "", "expert by expert" if shape.experts else _PIECES
        return type(chosen).__module__, chosen.text

    parts = []
    first = 1
    for rows in (*_MARKS, None):
        if rows is not None and way(rows)[0] == way(first)[0]:
            continue
        end = rows
        if rows is not None:  # where between two marks it changes
            low = max((mark for mark in _MARKS if mark < rows), default=1)
            end = bisect_right(range(low, rows), False, key=lambda m: way(m)[0] != way(first)[0]) + low
        where = f"from {first} on" if end is None else f"{first} to {end - 1}"
        parts.append(f"{where} rows of x: {way(first)[1]}")
        first = end or first
    return "; ".join(parts)


_PIECES = "the weight decoded piece by piece, torch's matmul on each"
_MARKS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
