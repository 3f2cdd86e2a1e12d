"""Expert by expert: the default of the grouped (mixture-of-experts) ops, and slices of stacked weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fourbit import double_quant
from fourbit.float_environment import subnormals_kept

if TYPE_CHECKING:
    from fourbit.backend import Backend

Weight = tuple[Tensor, Tensor, Tensor, int, Tensor | None, Tensor | None, Tensor | None]
"""packed, absmax, code, blocksize, nested_absmax, nested_code, nested_offset"""


def apply_experts(
    backend: Backend, x: Tensor, offsets: Tensor, weight: Weight, width: int, *, transpose: bool
) -> Tensor:
    """Each expert's rows of x times its weight (transposed or not), by the backend's own linear ops.

    `width` is the result's last dimension.
    """
    out = x.new_zeros(x.shape[0], width)
    n, k = (width, x.shape[-1]) if transpose else (x.shape[-1], width)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            out[start:end] = _one_expert(backend, x[start:end], weight, expert, n, k, transpose)
        start = max(start, end)
    return out


def _one_expert(backend: Backend, x: Tensor, weight: Weight, expert: int, n: int, k: int, transpose: bool) -> Tensor:
    part = slice_expert(weight, expert, n * k)
    if part is None:
        packed, absmax, code, blocksize, *nested = weight
        row = torch.tensor([expert], device=x.device)
        experts = 2 * packed.numel() // (n * k)
        w = backend.embedding_4bit(row, packed, absmax, code, blocksize, experts, n * k, x.dtype, *nested)
        w = w.view(n, k)
        return x @ (w.T if transpose else w)
    packed, absmax, code, blocksize, *_ = part
    if transpose:
        return backend.linear_4bit(x, packed, absmax, code, blocksize, n)
    return backend.linear_4bit_grad(x, packed, absmax, code, blocksize, k)


@subnormals_kept
def slice_expert(weight: Weight, expert: int, size: int) -> Weight | None:
    """The packed weight of one expert of `size` elements, its scales decoded; None if blocks straddle experts."""
    packed, absmax, code, blocksize, nested_absmax, nested_code, nested_offset = weight
    if size % blocksize:
        return None
    blocks = size // blocksize
    scales = absmax.reshape(-1)[expert * blocks : (expert + 1) * blocks]
    if nested_absmax is not None:
        assert nested_code is not None and nested_offset is not None
        block = torch.arange(expert * blocks, (expert + 1) * blocks, device=scales.device)
        nested = nested_absmax.reshape(-1)[block // double_quant.NESTED_BLOCKSIZE]
        scales = nested_code[scales.int()] * nested + nested_offset
    return packed.reshape(-1)[expert * size // 2 : (expert + 1) * size // 2], scales, code, blocksize, None, None, None
