"""Products with many rows: decode a piece of the weight into a scratch matrix, let torch's matmul work on it."""

from __future__ import annotations

from functools import cache, lru_cache
from math import gcd

import torch
from torch import Tensor
from torch.nn import functional

from fourbit.scales import NESTED_BLOCKSIZE
from fourbit.weight import Weight
from fourbit_gpu import elementwise
from fourbit_gpu.device import DeviceProps
from fourbit_gpu.launcher import Launcher
from fourbit_gpu.spec import KernelSpec


@cache
def slice_spec(dtype: torch.dtype, nested: bool) -> KernelSpec:
    """Kernel that decodes columns."""
    defines = {"DTYPE": elementwise.DTYPE_CODES[dtype], "NESTED": int(nested)}
    return KernelSpec.of("dequantize_slice.cu", "dequantize_slice", defines)


def linear(launcher: Launcher, x: Tensor, weight: Weight, out_features: int, bias: Tensor | None) -> Tensor:
    """See `Backend.linear_4bit`; rows of the weight piece by piece. x is not empty."""
    k, blocksize = x.shape[-1], weight.blocksize
    # a piece starts with a block, and with a nested block where the scales are double-quantized
    unit = blocksize * NESTED_BLOCKSIZE if weight.nested else blocksize
    step = _rows(launcher, x.numel() // k, out_features, k, x.element_size(), unit)
    scratch = x.new_empty((step, k))
    if step == out_features:
        return functional.linear(x, elementwise.dequantize(launcher, weight, (step, k), x.dtype, scratch), bias)
    out = x.new_empty((*x.shape[:-1], out_features))
    x, flat = x.view(-1, k), out.view(-1, out_features)
    for first in range(0, out_features, step):
        w = scratch[: out_features - first]
        elementwise.dequantize(launcher, weight, w.shape, x.dtype, w, first_block=first * k // blocksize)
        part = flat[:, first : first + step]
        if bias is None:
            torch.mm(x, w.t(), out=part)
        else:
            torch.addmm(bias[first : first + step], x, w.t(), out=part)
    return out


@lru_cache(maxsize=4096)
def _rows(launcher: Launcher, m: int, n: int, k: int, itemsize: int, unit: int) -> int:
    """Rows of the weight [n, k] in a piece, each a multiple of `unit` weights: all of them, or as many as
    `piece_columns` says."""
    whole = unit // gcd(k, unit)
    step = piece_columns(launcher.props, m, n, k, itemsize, whole=True)
    return min(-(-step // whole) * whole, n)


def linear_grad(launcher: Launcher, grad: Tensor, weight: Weight, in_features: int) -> Tensor:
    """See `Backend.linear_4bit_grad`; columns of the weight piece by piece, each result final.

    At most about half of a large weight is in 16 bit at a time.
    """
    n = grad.shape[-1]
    if grad.numel() == 0:
        return grad.new_zeros((*grad.shape[:-1], in_features))
    step = _columns(launcher, grad.numel() // n, in_features, n, grad.element_size())
    scratch = grad.new_empty((n, step))
    if step == in_features:
        return torch.matmul(grad, columns(launcher, weight, scratch, in_features, 0))
    out = grad.new_empty((*grad.shape[:-1], in_features))
    grad, flat = grad.view(-1, n), out.view(-1, in_features)
    for first in range(0, in_features, step):
        w = scratch
        if in_features - first < step:  # the last one
            w = scratch.view(-1)[: n * (in_features - first)].view(n, -1)
        torch.mm(grad, columns(launcher, weight, w, in_features, first), out=flat[:, first : first + step])
    return out


@lru_cache(maxsize=4096)
def _columns(launcher: Launcher, m: int, k: int, n: int, itemsize: int) -> int:
    """Columns of the weight [n, k] in a piece."""
    return piece_columns(launcher.props, m, k, n, itemsize, whole=False)


def columns(launcher: Launcher, weight: Weight, out: Tensor, k: int, first: int) -> Tensor:
    """Columns of the weight [rows, k], from `first` on, decoded into `out` [rows, width], which is returned."""
    rows, width = out.shape
    packed, absmax, code, blocksize, *_ = weight
    source = packed.data_ptr()
    aligned = source % 4 == 0 and k % 8 == 0 and first % 8 == 0 and width % 8 == 0
    parts = -(-width // 2048)
    args = (
        *(source, absmax.data_ptr(), code.data_ptr(), out.data_ptr(), rows, k, first, width),
        blocksize.bit_length() - 1,
        *elementwise.nested_addresses(weight),
        int(aligned),
    )
    blocks = min(rows, max(launcher.props.sm_count * 8 // parts, 1))
    launcher.launch(slice_spec(out.dtype, weight.nested), (blocks, parts, 1), 256, 0, args)
    return out


def piece_columns(props: DeviceProps, m: int, columns: int, inner: int, itemsize: int, *, whole: bool) -> int:
    """How many of `columns` output columns to decode at a time, `inner` weights each.

    A piece should stay in the second-level cache, but be wide enough for matmul to fill the device, and with `whole` be
    the whole weight rather than leave matmul's last wave partly filled, as long as it takes no more memory than the
    product's input and result; with `whole` False never more than half of the columns of a weight that is larger
    than a cache.
    """
    cached = props.l2_bytes // 2 // (inner * itemsize)
    filled = 2 * props.sm_count * 128 * 128 // max(m, 1)
    width = max(cached, filled, 128)
    if whole:
        width = max(width, m * (inner + columns) // inner)
    elif columns * inner * itemsize > props.l2_bytes:
        width = min(width, -(-columns // 2))
    width = -(-width // 128) * 128
    pieces = -(-columns // width)
    return min(columns, -(-columns // pieces // 128) * 128)
