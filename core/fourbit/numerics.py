"""Blockwise quantization in plain torch, on any torch device: what the reference and the defaults of Backend share.

Worked on in chunks, so that temporaries stay small. The arithmetic is that of `Backend`'s docstrings.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch
from torch import Tensor
from torch.nn import functional

from fourbit.codebooks import thresholds
from fourbit.float_environment import subnormals_kept

CHUNK = 1 << 21
"""Elements worked on at a time: bounds the temporaries, and keeps them near the cache."""

SMALLEST_NORMAL = 2.0**-126


def normalize_blocks(blocks: Tensor, signed_scale: bool = False, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale each row of `blocks` (float32 [b, blocksize]) by its absmax, or by the scale that is given for it.

    Returns `(normalized, absmax)`. A row of zeros, or with NaN or Inf, normalizes to zeros; the latter's
    absmax is NaN.
    """
    low, high = torch.aminmax(blocks, dim=1)  # both carry a NaN on
    absmax = torch.maximum(high, -low)
    if signed_scale:
        absmax = torch.where(high >= -low, absmax, low)
    if scales is not None:
        absmax = torch.where(absmax < torch.inf, scales, torch.nan)
    magnitude = absmax.abs()
    ordinary = (magnitude >= SMALLEST_NORMAL) & (magnitude < torch.inf)
    inverse = torch.ones_like(absmax) / absmax
    normalized = blocks * inverse[:, None]
    if not bool(ordinary.all()):
        rows = (~ordinary).nonzero().flatten()
        scale = absmax[rows]
        finite = scale.abs() < torch.inf
        quotient = blocks[rows] / scale[:, None]  # 1/absmax would overflow here
        keep = (finite & (scale != 0))[:, None]
        normalized[rows] = torch.where(keep, quotient, torch.zeros_like(quotient))
        absmax[rows] = torch.where(finite, scale, torch.full_like(scale, torch.nan))
    return normalized, absmax + 0.0  # no -0


def nearest(normalized: Tensor, code: Tensor) -> Tensor:
    """Codes (uint8) of the entries of `code` nearest to `normalized`."""
    edges, codes = thresholds(code)
    index = torch.bucketize(normalized, edges, out_int32=True)
    if bool((codes == torch.arange(len(codes), device=codes.device)).all()):
        return index.to(torch.uint8)
    return codes[index]


def chunks(count: int, blocksize: int) -> Iterator[tuple[int, int]]:
    """Ranges of elements, each but the last of whole blocks."""
    step = max(CHUNK // blocksize, 1) * blocksize
    for start in range(0, count, step):
        yield start, min(start + step, count)


def row_chunks(rows: int, k: int, blocksize: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of k elements, each but the last ending at the end of a block."""
    whole = blocksize // gcd(k, blocksize)  # that many rows are whole blocks
    step = max(CHUNK // (k * whole), 1) * whole
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def _as_blocks(part: Tensor, blocksize: int) -> Tensor:
    """A 1-D part as float32 [b, blocksize], zeros after a short last block."""
    part = part.to(torch.float32)
    short = -part.numel() % blocksize
    if short:
        part = functional.pad(part, (0, short))
    return part.view(-1, blocksize)


@subnormals_kept
def quantize_4bit(
    w: Tensor, code: Tensor, blocksize: int, signed_scale: bool = False, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `Backend.quantize_4bit`, and `Backend.quantize_4bit_scaled` for scales that are given."""
    flat = w.reshape(-1)
    count = flat.numel()
    packed = torch.empty(-(-count // 2), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(-(-count // blocksize), dtype=torch.float32, device=w.device)
    for start, end in chunks(count, blocksize):
        given = None if scales is None else scales.reshape(-1)[start // blocksize : -(-end // blocksize)]
        normalized, scale = normalize_blocks(_as_blocks(flat[start:end], blocksize), signed_scale, given)
        absmax[start // blocksize : start // blocksize + scale.numel()] = scale
        # the zeros that fill a short block take the code of zero, and so does an odd count's last nibble
        codes = nearest(normalized, code).view(-1)[: end - start + (end - start) % 2]
        packed[start // 2 : -(-end // 2)] = (codes[0::2] << 4) | codes[1::2]
    return packed.view(-1, 1), absmax


@subnormals_kept
def quantize_blockwise(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """See `Backend.quantize_blockwise`."""
    flat = x.reshape(-1)
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-flat.numel() // blocksize), dtype=torch.float32, device=x.device)
    for start, end in chunks(flat.numel(), blocksize):
        normalized, scale = normalize_blocks(_as_blocks(flat[start:end], blocksize))
        absmax[start // blocksize : start // blocksize + scale.numel()] = scale
        codes[start:end] = nearest(normalized, code).view(-1)[: end - start]
    return codes.view(x.shape), absmax


@subnormals_kept
def dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """See `Backend.dequantize_blockwise`."""
    out = torch.empty(codes.numel(), dtype=dtype, device=codes.device)
    flat, absmax = codes.reshape(-1), absmax.reshape(-1)
    for start, end in chunks(flat.numel(), blocksize):
        values = functional.embedding(flat[start:end].int(), code[:, None]).view(-1)
        scale = absmax[start // blocksize : -(-end // blocksize)]
        out[start:end] = values * scale.repeat_interleave(blocksize)[: end - start]
    return out.view(codes.shape)
