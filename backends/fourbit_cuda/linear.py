"""Launches of the 4-bit products: the fused kernels for few and for many rows of x, pieces and torch's matmul.

Tensors come as `Backend` promises: on the launcher's device, contiguous, at any address.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fourbit.weight import Weight
from fourbit_cuda import matmul, plan, route
from fourbit_cuda.tile import Shape
from fourbit_gpu import pieces
from fourbit_gpu.device import DeviceProps
from fourbit_gpu.elementwise import DTYPE_CODES
from fourbit_gpu.launcher import Launcher

_Launch = Callable[..., None]
"""Called with the addresses of x, packed, absmax, code, the three of nested scales, bias or offsets, and the result: 0
for what there is not."""


class _Ready(NamedTuple):
    """A plan with its kernels loaded.

    Attributes:
        launch: of all its kernels.
        size: of the result.
        strides: of the result.
        reads_scales: by copies of 16 bytes.
    """

    launch: _Launch
    size: tuple[int, ...]
    strides: tuple[int, ...]
    reads_scales: bool


_ready: dict[tuple[object, ...], _Ready | None] = {}
"""None: pieces."""
_MOST_READY = 4096
ARRANGE_THREADS = 256

# in a third of the time of torch.empty: what code that torch.compile generates allocates with
_empty: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor] = getattr(
    torch._C._dynamo.guards,
    "_empty_strided_cuda",
    lambda size, strides, dtype: torch.empty_strided(size, strides, dtype=dtype, device="cuda"),
)
"""Memory on the current device, by size, strides and dtype."""


def linear(launcher: Launcher, x: Tensor, weight: Weight, out_features: int, bias: Tensor | None = None) -> Tensor:
    """See `Backend.linear_4bit`."""
    out = _fused(launcher, x, weight, out_features, 0 if bias is None else bias.data_ptr())
    if out is not None:
        return out
    if x.numel() == 0:
        return x.new_empty((*x.shape[:-1], out_features))
    return pieces.linear(launcher, x, weight, out_features, bias)


def linear_grad(launcher: Launcher, grad: Tensor, weight: Weight, in_features: int) -> Tensor:
    """See `Backend.linear_4bit_grad`."""
    out = _fused(launcher, grad, weight, in_features, 0, transposed=True)
    return pieces.linear_grad(launcher, grad, weight, in_features) if out is None else out


def grouped(launcher: Launcher, x: Tensor, offsets: Tensor, weight: Weight, out_features: int) -> Tensor | None:
    """See `Backend.grouped_linear_4bit`: all experts in one launch, without a look at the offsets; None if no kernel
    can run."""
    experts, wide = offsets.numel(), offsets.dtype is torch.int64
    return _fused(launcher, x, weight, out_features, offsets.data_ptr(), False, experts, wide)


def grouped_grad(launcher: Launcher, grad: Tensor, offsets: Tensor, weight: Weight, in_features: int) -> Tensor | None:
    """See `Backend.grouped_linear_4bit_grad`; likewise."""
    experts, wide = offsets.numel(), offsets.dtype is torch.int64
    return _fused(launcher, grad, weight, in_features, offsets.data_ptr(), True, experts, wide)


def _fused(
    launcher: Launcher,
    x: Tensor,
    weight: Weight,
    width: int,
    last: int,
    transposed: bool = False,
    experts: int = 0,
    wide: bool = False,
) -> Tensor | None:
    """The product with the weight decoded inside of it; None where no kernel takes it, or pieces are faster.

    `last`: address of the bias or of the offsets, which `wide` says are int64, or 0.
    """
    packed, absmax, code, blocksize, nested_absmax, nested_code, nested_offset = weight
    dtype = x.dtype
    key = (launcher, x.shape, width, dtype, blocksize, nested_absmax is None, transposed, experts, wide)
    try:
        ready = _ready[key]
    except KeyError:
        ready = _prepare(*key)
        if len(_ready) >= _MOST_READY:
            _ready.clear()
        _ready[key] = ready
    if ready is None:
        return None
    launch, size, strides, reads_scales = ready
    x_at, packed_at, absmax_at = x.data_ptr(), packed.data_ptr(), absmax.data_ptr()
    if (x_at | packed_at | (absmax_at if reads_scales else 0)) & 15:
        return None
    a = b = c = 0
    if nested_absmax is not None:
        assert nested_code is not None and nested_offset is not None
        a, b, c = nested_absmax.data_ptr(), nested_code.data_ptr(), nested_offset.data_ptr()
    out = _empty(size, strides, dtype)
    launch(x_at, packed_at, absmax_at, code.data_ptr(), a, b, c, last, out.data_ptr())
    return out


def _prepare(
    launcher: Launcher,
    size: torch.Size,
    width: int,
    dtype: torch.dtype,
    blocksize: int,
    plain: bool,
    transposed: bool,
    experts: int,
    wide: bool,
) -> _Ready | None:
    """Choose, compile and load once."""
    rows, inner = size[:-1].numel(), size[-1]
    n, k = (inner, width) if transposed else (width, inner)
    shape = Shape(rows, n, k, DTYPE_CODES[dtype], blocksize, not plain, experts, transposed)
    chosen = route.route(launcher.props, shape) if rows and inner else None
    if chosen is None:
        return None
    kernel: Any = launcher.kernel(chosen.spec, chosen.shared_bytes)
    launch: _Launch
    if isinstance(chosen, matmul.Plan):
        launch = matmul.Ready(kernel, chosen, shape, wide)
    else:
        launch = _few(launcher, kernel, chosen, shape, wide)
    result = (*size[:-1], width)
    strides = [1] * len(result)
    for i in range(len(result) - 1, 0, -1):
        strides[i - 1] = strides[i] * result[i]
    return _Ready(launch, result, tuple(strides), reads_scales=isinstance(chosen, plan.Plan))


def _few(launcher: Launcher, kernel: Any, chosen: plan.Plan, shape: Shape, wide: bool) -> _Launch:
    """What launches a plan for few rows."""
    m, n, k, experts = shape.m, shape.n, shape.k, shape.experts
    sizes = (m, n, k, chosen.range_rows, chosen.pass_rows, experts, int(wide))
    overlapping = launcher.props.arch >= 90 and not experts
    launch: _Launch = kernel.bind(chosen.grid, chosen.threads, chosen.shared_bytes, 9, sizes, overlapping)
    if chosen.arrange is None:
        return launch
    spec, size = chosen.arrange
    pieces_of_16 = size // 16
    columns = int(dict(spec.defines)["COLUMNS"])
    parts = size // (128 * -(-m // columns) * columns)
    blocks = (-(-pieces_of_16 // ARRANGE_THREADS), 1, 1)
    first_kernel: Any = launcher.kernel(spec)
    first = first_kernel.bind(blocks, ARRANGE_THREADS, 0, 2, (m, k, parts, pieces_of_16), overlapping)

    def both(x: int, *rest: int) -> None:
        arranged = _empty((size,), (1,), torch.uint8)
        at = arranged.data_ptr()
        first(x, at)
        launch(at, *rest)

    return both


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
