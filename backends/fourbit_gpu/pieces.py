"""Products with many rows: decode a piece of the weight into a scratch matrix, let torch's matmul work on it."""

from __future__ import annotations

from functools import cache
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
    shape, x = (*x.shape[:-1], out_features), x.reshape(-1, k)
    m = x.shape[0]
    # a piece starts with a block, and with a nested block where the scales are double-quantized
    unit = blocksize * NESTED_BLOCKSIZE if weight.nested else blocksize
    whole = unit // gcd(k, unit)
    step = piece_columns(launcher.props, m, out_features, k, x.element_size(), whole=True)
    step = -(-step // whole) * whole
    if step >= out_features:
        w = elementwise.dequantize(launcher, weight, (out_features, k), x.dtype)
        return functional.linear(x, w, bias).view(shape)
    out = torch.empty(m, out_features, dtype=x.dtype, device=x.device)
    scratch = torch.empty(step * k, dtype=x.dtype, device=x.device)
    for first in range(0, out_features, step):
        rows = min(step, out_features - first)
        w = scratch[: rows * k]
        elementwise.dequantize(launcher, weight, (rows, k), x.dtype, out=w, first_block=first * k // blocksize)
        part = out[:, first : first + rows]
        if bias is None:
            torch.mm(x, w.view(rows, k).t(), out=part)
        else:
            torch.addmm(bias[first : first + rows], x, w.view(rows, k).t(), out=part)
    return out.view(shape)


def linear_grad(launcher: Launcher, grad: Tensor, weight: Weight, in_features: int) -> Tensor:
    """See `Backend.linear_4bit_grad`; columns of the weight piece by piece, each result final.

    At most about half of a large weight is in 16 bit at a time.
    """
    n = grad.shape[-1]
    shape = (*grad.shape[:-1], in_features)
    if grad.numel() == 0:
        return grad.new_zeros(shape)
    grad = grad.reshape(-1, n)
    m = grad.shape[0]
    step = piece_columns(launcher.props, m, in_features, n, grad.element_size(), whole=False)
    scratch = torch.empty(n * step, dtype=grad.dtype, device=grad.device)
    if step >= in_features:
        return (grad @ columns(launcher, weight, scratch, n, in_features, 0, in_features)).view(shape)
    out = torch.empty(m, in_features, dtype=grad.dtype, device=grad.device)
    for first in range(0, in_features, step):
        width = min(step, in_features - first)
        w = columns(launcher, weight, scratch, n, in_features, first, width)
        torch.mm(grad, w, out=out[:, first : first + width])
    return out.view(shape)


def columns(launcher: Launcher, weight: Weight, out: Tensor, rows: int, k: int, first: int, width: int) -> Tensor:
    """Columns first … first + width of the weight [rows, k], decoded into the start of `out`: [rows, width]."""
    packed, absmax, code, blocksize, *_ = weight
    spec = slice_spec(out.dtype, weight.nested)
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
    launcher.launch(spec, (blocks, parts, 1), 256, 0, args)
    return out[: rows * width].view(rows, width)


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
