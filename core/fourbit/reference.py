"""The reference backend: every op in plain torch, on any torch device. The oracle, and the last fallback."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd

import torch
from torch import Tensor
from torch.nn import functional

from fourbit import double_quant
from fourbit.backend import Backend, OpQuery
from fourbit.codebooks import thresholds
from fourbit.float_environment import subnormals_kept
from fourbit.hookspecs import hookimpl

CHUNK = 1 << 21
"""Elements worked on at a time: bounds the temporaries, and keeps them near the cache."""

SMALLEST_NORMAL = 2.0**-126


def normalize_blocks(blocks: Tensor, signed_scale: bool = False) -> tuple[Tensor, Tensor]:
    """Scale each row of `blocks` (float32 [b, blocksize]) by its absmax.

    Returns `(normalized, absmax)`. A row of zeros, or with NaN or Inf, normalizes to zeros; the latter's
    absmax is NaN.
    """
    low, high = torch.aminmax(blocks, dim=1)  # both carry a NaN on
    absmax = torch.maximum(high, -low)
    if signed_scale:
        absmax = torch.where(high >= -low, absmax, low)
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


def _chunks(count: int, blocksize: int) -> Iterator[tuple[int, int]]:
    """Ranges of elements, each but the last of whole blocks."""
    step = max(CHUNK // blocksize, 1) * blocksize
    for start in range(0, count, step):
        yield start, min(start + step, count)


def _as_blocks(part: Tensor, blocksize: int) -> Tensor:
    """A 1-D part as float32 [b, blocksize], zeros after a short last block."""
    part = part.to(torch.float32)
    short = -part.numel() % blocksize
    if short:
        part = functional.pad(part, (0, short))
    return part.view(-1, blocksize)


@subnormals_kept
def quantize_blockwise(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """See `Backend.quantize_blockwise`."""
    flat = x.reshape(-1)
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-flat.numel() // blocksize), dtype=torch.float32, device=x.device)
    for start, end in _chunks(flat.numel(), blocksize):
        normalized, scale = normalize_blocks(_as_blocks(flat[start:end], blocksize))
        absmax[start // blocksize : start // blocksize + scale.numel()] = scale
        codes[start:end] = nearest(normalized, code).view(-1)[: end - start]
    return codes.view(x.shape), absmax


@subnormals_kept
def dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """See `Backend.dequantize_blockwise`."""
    out = torch.empty(codes.numel(), dtype=dtype, device=codes.device)
    flat, absmax = codes.reshape(-1), absmax.reshape(-1)
    for start, end in _chunks(flat.numel(), blocksize):
        values = functional.embedding(flat[start:end].int(), code[:, None]).view(-1)
        scale = absmax[start // blocksize : -(-end // blocksize)]
        out[start:end] = values * scale.repeat_interleave(blocksize)[: end - start]
    return out.view(codes.shape)


class ReferenceBackend(Backend):
    """Plain torch. Slow and right; what every other backend's bits are compared with."""

    api_version = 1
    name = "reference"
    device_types = ("*",)
    priority = 0

    @subnormals_kept
    def quantize_4bit(self, w: Tensor, code: Tensor, blocksize: int, signed_scale: bool) -> tuple[Tensor, Tensor]:
        flat = w.reshape(-1)
        count = flat.numel()
        packed = torch.empty(-(-count // 2), dtype=torch.uint8, device=w.device)
        absmax = torch.empty(-(-count // blocksize), dtype=torch.float32, device=w.device)
        for start, end in _chunks(count, blocksize):
            normalized, scale = normalize_blocks(_as_blocks(flat[start:end], blocksize), signed_scale)
            absmax[start // blocksize : start // blocksize + scale.numel()] = scale
            # the zeros that fill a short block take the code of zero, and so does an odd count's last nibble
            codes = nearest(normalized, code).view(-1)[: end - start + (end - start) % 2]
            packed[start // 2 : -(-end // 2)] = (codes[0::2] << 4) | codes[1::2]
        return packed.view(-1, 1), absmax

    @subnormals_kept
    def dequantize_4bit(
        self,
        packed: Tensor,
        absmax: Tensor,
        code: Tensor,
        blocksize: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        nested_absmax: Tensor | None = None,
        nested_code: Tensor | None = None,
        nested_offset: Tensor | None = None,
    ) -> Tensor:
        out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
        flat = out.view(-1)
        decoder = _Decoder(packed, absmax, code, blocksize, nested_absmax, nested_code, nested_offset)
        for start, end in _chunks(flat.numel(), blocksize):
            flat[start:end] = decoder.range(start, end)
        return out

    def linear_4bit(
        self,
        x: Tensor,
        packed: Tensor,
        absmax: Tensor,
        code: Tensor,
        blocksize: int,
        out_features: int,
        nested_absmax: Tensor | None = None,
        nested_code: Tensor | None = None,
        nested_offset: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        k = x.shape[-1]
        decoder = _Decoder(packed, absmax, code, blocksize, nested_absmax, nested_code, nested_offset)
        parts = []
        for first, last in _row_chunks(out_features, k, blocksize):
            w = decoder.range(first * k, last * k, x.dtype).view(last - first, k)
            parts.append(functional.linear(x, w, None if bias is None else bias[first:last]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def linear_4bit_grad(
        self,
        grad: Tensor,
        packed: Tensor,
        absmax: Tensor,
        code: Tensor,
        blocksize: int,
        in_features: int,
        nested_absmax: Tensor | None = None,
        nested_code: Tensor | None = None,
        nested_offset: Tensor | None = None,
    ) -> Tensor:
        n = grad.shape[-1]
        decoder = _Decoder(packed, absmax, code, blocksize, nested_absmax, nested_code, nested_offset)
        total: Tensor | None = None
        for first, last in _row_chunks(n, in_features, blocksize):
            w = decoder.range(first * in_features, last * in_features, grad.dtype).view(-1, in_features)
            part = grad[..., first:last] @ w
            if last - first == n:
                return part
            total = part.float() if total is None else total.add_(part)  # one rounding, not one a chunk
        assert total is not None
        return total.to(grad.dtype)

    @subnormals_kept
    def embedding_4bit(
        self,
        ids: Tensor,
        packed: Tensor,
        absmax: Tensor,
        code: Tensor,
        blocksize: int,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype,
        nested_absmax: Tensor | None = None,
        nested_code: Tensor | None = None,
        nested_offset: Tensor | None = None,
    ) -> Tensor:
        rows = ids.reshape(-1).long()
        _check_ids(rows, num_embeddings)
        decoder = _Decoder(packed, absmax, code, blocksize, nested_absmax, nested_code, nested_offset)
        out = torch.empty(rows.numel(), embedding_dim, dtype=dtype, device=ids.device)
        step = max(CHUNK // embedding_dim, 1)
        for start in range(0, rows.numel(), step):
            out[start : start + step] = decoder.rows(rows[start : start + step], embedding_dim)
        return out.view(*ids.shape, embedding_dim)


def _row_chunks(rows: int, k: int, blocksize: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of k elements, each but the last ending at the end of a block."""
    whole = blocksize // gcd(k, blocksize)  # that many rows are whole blocks
    step = max(CHUNK // (k * whole), 1) * whole
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def _check_ids(rows: Tensor, count: int) -> None:
    bad = (rows < 0) | (rows >= count)
    if rows.device.type != "cpu":
        torch._assert_async(~bad.any(), f"embedding_4bit: an id is out of range for {count} rows")
    elif bool(bad.any()):
        first = int(bad.nonzero()[0, 0])
        raise IndexError(f"embedding_4bit: id {int(rows[first])} (position {first}) is out of range for {count} rows")


class _Decoder:
    """Float32 values of any part of a packed weight."""

    def __init__(
        self,
        packed: Tensor,
        absmax: Tensor,
        code: Tensor,
        blocksize: int,
        nested_absmax: Tensor | None,
        nested_code: Tensor | None,
        nested_offset: Tensor | None,
    ) -> None:
        self.packed = packed.reshape(-1)
        self.code = code
        self.blocksize = blocksize
        self.absmax = absmax.reshape(-1)
        if nested_absmax is not None:
            assert nested_code is not None and nested_offset is not None
            self.absmax = double_quant.decode_scales(self.absmax, nested_absmax, nested_code, nested_offset)
        # one lookup a byte: the pairs of values that each of the 256 bytes stands for
        self.pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)

    @subnormals_kept
    def range(self, start: int, end: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Elements start to end, 1-D, as `dtype`; `start` must be a multiple of the blocksize."""
        count, blocksize = end - start, self.blocksize
        values = functional.embedding(self.packed[start // 2 : -(-end // 2)].int(), self.pairs).view(-1)[:count]
        scale = self.absmax[start // blocksize : -(-end // blocksize)]
        if count % blocksize == 0:
            return (values.view(-1, blocksize) * scale[:, None]).view(-1).to(dtype)
        return (values * scale.repeat_interleave(blocksize)[:count]).to(dtype)

    def rows(self, ids: Tensor, dim: int) -> Tensor:
        """Rows `ids` of a weight with `dim` columns: [len(ids), dim]."""
        element = ids[:, None] * dim + torch.arange(dim, device=ids.device)
        byte = self.packed[element >> 1]
        nibble = torch.where(element % 2 == 0, byte >> 4, byte & 15)
        return self.code[nibble.int()] * self.absmax[element // self.blocksize]


backend = ReferenceBackend()


@hookimpl
def fourbit_register_backends(register: object) -> None:
    """The built-in last fallback."""
    assert callable(register)
    register(backend)


__all__ = ["OpQuery", "ReferenceBackend", "dequantize_blockwise", "quantize_blockwise"]
