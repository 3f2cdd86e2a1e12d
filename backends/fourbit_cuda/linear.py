"""Launches of the 4-bit products: the fused kernels for few and for many rows of x, pieces and torch's matmul.

Tensors come as `Backend` promises: on the launcher's device, contiguous, at any address.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fourbit.weight import Weight
from fourbit_cuda import matmul, route
from fourbit_cuda.matmul import Ready
from fourbit_cuda.tile import Shape
from fourbit_gpu import pieces
from fourbit_gpu.device import DeviceProps
from fourbit_gpu.elementwise import DTYPE_CODES, nested_addresses
from fourbit_gpu.launcher import Launcher

_Arrange = tuple[Callable[..., None], tuple[int, int, int], tuple[int, ...], int]
"""What lays x out first: launch, grid, last arguments, bytes of the result."""

_FewReady = tuple[Callable[..., None], tuple[int, int, int], int, int, tuple[int, ...], bool, _Arrange | None]
"""A plan for few rows with its kernel loaded: launch, grid, threads, shared bytes, last arguments, whether launches
overlap."""

_ready: dict[tuple[object, ...], _FewReady | Ready | None] = {}
"""None: pieces."""
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
        nested = nested_absmax is not None
        ready = _prepare(key, launcher, Shape(m, out_features, k, DTYPE_CODES[x.dtype], blocksize, nested))
    if ready is not None:
        x_at, packed_at, absmax_at = x.data_ptr(), packed.data_ptr(), absmax.data_ptr()
        if not (x_at | packed_at | absmax_at) & 15:
            out = _empty((*shape[:-1], out_features), dtype=x.dtype, device=x.device)
            if isinstance(ready, Ready):
                scales = (absmax_at, code.data_ptr(), *nested_addresses(weight))
                ready(x_at, packed_at, scales, 0 if bias is None else bias.data_ptr(), out.data_ptr())
                return out
            launch, grid, threads, shared, tail, overlapping, arrange = ready
            if arrange is not None:
                first, blocks, last, size = arrange
                arranged = _empty(size, dtype=torch.uint8, device=x.device)
                first(blocks, ARRANGE_THREADS, 0, (x_at, arranged.data_ptr(), *last), overlapping)
                x_at = arranged.data_ptr()
            nested_at = (0, 0, 0)
            if nested_absmax is not None:
                assert nested_code is not None and nested_offset is not None
                nested_at = (nested_absmax.data_ptr(), nested_code.data_ptr(), nested_offset.data_ptr())
            args = (
                *(x_at, packed_at, absmax_at, code.data_ptr(), *nested_at),
                *(0 if bias is None else bias.data_ptr(), out.data_ptr(), *tail),
            )
            launch(grid, threads, shared, args, overlapping)
            return out
    if m == 0:
        return x.new_empty((*shape[:-1], out_features))
    return pieces.linear(launcher, x, weight, out_features, bias)


def linear_grad(launcher: Launcher, grad: Tensor, weight: Weight, in_features: int) -> Tensor:
    """See `Backend.linear_4bit_grad`."""
    shape = grad.shape
    n = shape[-1]
    m = grad.numel() // n if n else 0
    ready = _of_transposed(launcher, grad, weight, m, n, in_features, 0)
    if ready is None:
        return pieces.linear_grad(launcher, grad, weight, in_features)
    out = _empty((*shape[:-1], in_features), dtype=grad.dtype, device=grad.device)
    scales = (weight.absmax.data_ptr(), weight.code.data_ptr(), *nested_addresses(weight))
    ready(grad.data_ptr(), weight.packed.data_ptr(), scales, 0, out.data_ptr())
    return out


def _of_transposed(
    launcher: Launcher, grad: Tensor, weight: Weight, m: int, n: int, k: int, experts: int
) -> Ready | None:
    """What launches a gradient; None where pieces serve it."""
    key = (launcher, "transposed", m, n, k, grad.dtype, weight.blocksize, weight.nested, experts)
    try:
        ready = _ready[key]
    except KeyError:
        shape = Shape(m, n, k, DTYPE_CODES[grad.dtype], weight.blocksize, weight.nested, experts, transposed=True)
        ready = _prepare(key, launcher, shape)
    if ready is None or (grad.data_ptr() | weight.packed.data_ptr()) & 15:
        return None
    assert isinstance(ready, Ready)
    return ready


def _prepare(key: tuple[object, ...], launcher: Launcher, shape: Shape) -> _FewReady | Ready | None:
    """Choose, compile and load once."""
    ready = _load(launcher, shape) if shape.m else None
    if len(_ready) >= _MOST_READY:
        _ready.clear()
    _ready[key] = ready
    return ready


def _load(launcher: Launcher, shape: Shape) -> _FewReady | Ready | None:
    chosen = route.route(launcher.props, shape)
    if chosen is None:
        return None
    kernel: Any = launcher.kernel(chosen.spec, chosen.shared_bytes)
    if isinstance(chosen, matmul.Plan):
        return Ready(kernel, chosen, shape)
    tail: tuple[int, ...] = (shape.m, shape.n, shape.k, chosen.range_rows, chosen.pass_rows, shape.experts)
    if not shape.experts:  # of experts the width of their offsets follows
        tail = (*tail, 0)
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
    """See `Backend.grouped_linear_4bit`: all experts in one launch, without a look at the offsets; None if no kernel
    can run."""
    packed, absmax, code, blocksize, *_ = weight
    m, k = x.shape
    experts = offsets.numel()
    key = (launcher, m, out_features, k, x.dtype, blocksize, not weight.nested, experts)
    try:
        ready = _ready[key]
    except KeyError:
        shape = Shape(m, out_features, k, DTYPE_CODES[x.dtype], blocksize, weight.nested, experts)
        ready = _prepare(key, launcher, shape)
    if ready is None or (x.data_ptr() | packed.data_ptr() | absmax.data_ptr()) & 15:
        return None
    out = _empty((m, out_features), dtype=x.dtype, device=x.device)
    scales = (absmax.data_ptr(), code.data_ptr(), *nested_addresses(weight))
    last, wide = offsets.data_ptr(), offsets.dtype == torch.int64
    if isinstance(ready, Ready):
        ready(x.data_ptr(), packed.data_ptr(), scales, last, out.data_ptr(), wide)
        return out
    launch, grid, threads, shared, tail, *_ = ready
    args = (x.data_ptr(), packed.data_ptr(), *scales, last, out.data_ptr(), *tail, int(wide))
    launch(grid, threads, shared, args)
    return out


def grouped_grad(launcher: Launcher, grad: Tensor, offsets: Tensor, weight: Weight, in_features: int) -> Tensor | None:
    """See `Backend.grouped_linear_4bit_grad`; likewise."""
    m, n = grad.shape
    ready = _of_transposed(launcher, grad, weight, m, n, in_features, offsets.numel())
    if ready is None:
        return None
    out = _empty((m, in_features), dtype=grad.dtype, device=grad.device)
    scales = (weight.absmax.data_ptr(), weight.code.data_ptr(), *nested_addresses(weight))
    last, wide = offsets.data_ptr(), offsets.dtype == torch.int64
    ready(grad.data_ptr(), weight.packed.data_ptr(), scales, last, out.data_ptr(), wide)
    return out


def describe(
    props: DeviceProps, op: str, dtype: torch.dtype, blocksize: int, nested: bool, shape: tuple[int, ...]
) -> str:
    """One line on how an op runs for a weight of `shape` [n, k] or [experts, n, k], for `fourbit.explain`."""
    transposed = op in ("linear_4bit_grad", "grouped_linear_4bit_grad")
    if len(shape) not in (2, 3):
        return "fused kernels, or decoded pieces and torch's matmul, by the number of rows"
    experts = shape[0] if len(shape) == 3 else 0
    described = Shape(1, shape[-2], shape[-1], DTYPE_CODES[dtype], blocksize, nested, experts, transposed)
    return route.describe(props, described)
