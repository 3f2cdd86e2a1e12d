"""Launches of the 4-bit products: the fused kernel for few rows of x, pieces and torch's matmul for many.

Tensors come as `Backend` promises: on the launcher's device, contiguous, at any address.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fourbit.weight import Weight
from fourbit_cuda import plan
from fourbit_cuda.tile import Shape
from fourbit_gpu import pieces
from fourbit_gpu.device import DeviceProps
from fourbit_gpu.elementwise import DTYPE_CODES, nested_addresses
from fourbit_gpu.launcher import Launcher

_Arrange = tuple[Callable[..., None], tuple[int, int, int], tuple[int, ...], int]
"""What lays x out first: launch, grid, last arguments, bytes of the result."""

_Ready = tuple[Callable[..., None], tuple[int, int, int], int, int, tuple[int, ...], bool, _Arrange | None]
"""A plan with its kernel loaded: launch, grid, threads, shared bytes, last arguments, whether launches overlap."""

_ready: dict[tuple[object, ...], _Ready | None] = {}
_MOST_READY = 4096
ARRANGE_THREADS = 256
_empty = torch.empty


def linear(launcher: Launcher, x: Tensor, weight: Weight, out_features: int, bias: Tensor | None = None) -> Tensor:
    """See `Backend.linear_4bit`."""
    packed, absmax, code, blocksize, nested_absmax, nested_code, nested_offset = weight
    shape = x.shape
    k = shape[-1]
    m = x.numel() // k if k else 0
    key = (launcher, m, out_features, k, x.dtype, blocksize, nested_absmax is None)
    try:
        ready = _ready[key]
    except KeyError:
        ready = _prepare(key, launcher, m, out_features, k, x.dtype, blocksize, nested_absmax is not None)
    if ready is not None:
        x_at, packed_at, absmax_at = x.data_ptr(), packed.data_ptr(), absmax.data_ptr()
        if not (x_at | packed_at | absmax_at) & 15:
            out = _empty((*shape[:-1], out_features), dtype=x.dtype, device=x.device)
            launch, grid, threads, shared, tail, overlapping, arrange = ready
            if arrange is not None:
                first, blocks, last, size = arrange
                arranged = _empty(size, dtype=torch.uint8, device=x.device)
                first(blocks, ARRANGE_THREADS, 0, (x_at, arranged.data_ptr(), *last), overlapping)
                x_at = arranged.data_ptr()
            nested = (0, 0, 0)
            if nested_absmax is not None:
                assert nested_code is not None and nested_offset is not None
                nested = (nested_absmax.data_ptr(), nested_code.data_ptr(), nested_offset.data_ptr())
            args = (
                *(x_at, packed_at, absmax_at, code.data_ptr(), *nested),
                *(0 if bias is None else bias.data_ptr(), out.data_ptr(), *tail),
            )
            launch(grid, threads, shared, args, overlapping)
            return out
    if m == 0:
        return x.new_empty((*shape[:-1], out_features))
    return pieces.linear(launcher, x, weight, out_features, bias)


def _prepare(
    key: tuple[object, ...],
    launcher: Launcher,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    blocksize: int,
    nested: bool,
) -> _Ready | None:
    """Plan, compile and load once; None if pieces serve the shape."""
    shape = Shape(m, n, k, DTYPE_CODES[dtype], blocksize, nested)
    ready = _load(launcher, shape) if m and plan.use_fused(shape) else None
    if len(_ready) >= _MOST_READY:
        _ready.clear()
    _ready[key] = ready
    return ready


def _load(launcher: Launcher, shape: Shape) -> _Ready | None:
    chosen = plan.plan_linear(launcher.props, shape)
    if chosen is None:
        return None
    kernel: Any = launcher.kernel(chosen.spec, chosen.shared_bytes)
    tail = (shape.m, shape.n, shape.k, chosen.range_rows, chosen.pass_rows)
    overlapping = launcher.props.arch >= 90 and not shape.experts
    arrange = None
    if chosen.arrange is not None:
        spec, size = chosen.arrange
        pieces_of_16 = size // 16
        columns = int(dict(spec.defines)["COLUMNS"])
        parts = size // (128 * -(-shape.m // columns) * columns)
        first: Any = launcher.kernel(spec)
        blocks = (-(-pieces_of_16 // ARRANGE_THREADS), 1, 1)
        arrange = (first.launch, blocks, (shape.m, shape.k, parts, pieces_of_16), size)
    return kernel.launch, chosen.grid, chosen.threads, chosen.shared_bytes, tail, overlapping, arrange


def grouped(launcher: Launcher, x: Tensor, offsets: Tensor, weight: Weight, out_features: int) -> Tensor | None:
    """See `Backend.grouped_linear_4bit`: all experts in one launch, without a look at the offsets; None if another
    way serves better (many rows an expert) or the kernel cannot run (`plan.fits_fused`, or an address)."""
    packed, absmax, code, blocksize, *_ = weight
    m, k = x.shape
    experts = offsets.numel()
    if m == 0 or m > experts * plan.FUSED_ROWS:
        return None
    key = (launcher, m, out_features, k, x.dtype, blocksize, not weight.nested, experts)
    try:
        ready = _ready[key]
    except KeyError:
        shape = Shape(m, out_features, k, DTYPE_CODES[x.dtype], blocksize, weight.nested, experts)
        ready = _ready[key] = _load(launcher, shape)
    if ready is None or (x.data_ptr() | packed.data_ptr() | absmax.data_ptr()) & 15:
        return None
    out = x.new_zeros(m, out_features)
    launch, grid, threads, shared, tail, *_ = ready
    ends = offsets.to(torch.int64)
    args = (
        *(x.data_ptr(), packed.data_ptr(), absmax.data_ptr(), code.data_ptr(), *nested_addresses(weight)),
        *(ends.data_ptr(), out.data_ptr(), *tail),
    )
    launch(grid, threads, shared, args)
    return out


def describe(
    props: DeviceProps, op: str, dtype: torch.dtype, blocksize: int, nested: bool, shape: tuple[int, ...]
) -> str:
    """One line on how an op runs for a weight of `shape` [n, k], for `fourbit.explain`."""
    if op == "linear_4bit_grad":
        return "columns of the weight decoded piece by piece, torch's matmul on each"
    if len(shape) != 2:
        return "fused kernel for few rows of x, decoded pieces and torch's matmul for many"
    n, k = shape
    lines = []
    for m in (1, 16, plan.FUSED_ROWS):
        chosen = plan.plan_linear(props, Shape(m, n, k, DTYPE_CODES[dtype], blocksize, nested))
        if chosen is None:
            return "the weight decoded piece by piece, torch's matmul on each (no fused kernel: see backends/README.md)"
        lines.append(f"{m} row{'s' if m > 1 else ''} of x: {chosen.text}")
    most = plan.FUSED_ROWS * plan.FUSED_PASSES
    return "; ".join(lines) + f"; from {most + 1} rows on: decoded piece by piece, torch's matmul on each"
