"""The reference backend: every op in plain torch, on any torch device. The oracle, and the last fallback."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fourbit import numerics
from fourbit.backend import Backend
from fourbit.float_environment import subnormals_kept
from fourbit.hookspecs import hookimpl
from fourbit.weight import Weight


class ReferenceBackend(Backend):
    """Plain torch. Slow and right; what every other backend's bits are compared with."""

    api_version = 2
    name = "reference"
    device_types = ("*",)
    priority = 0

    def quantize_4bit(self, w: Tensor, code: Tensor, blocksize: int, signed_scale: bool) -> tuple[Tensor, Tensor]:
        return numerics.quantize_4bit(w, code, blocksize, signed_scale)

    @subnormals_kept
    def dequantize_4bit(self, weight: Weight, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        out = torch.empty(tuple(shape), dtype=dtype, device=weight.packed.device)
        flat = out.view(-1)
        decoder = _Decoder(weight)
        for start, end in numerics.chunks(flat.numel(), weight.blocksize):
            flat[start:end] = decoder.range(start, end)
        return out

    def linear_4bit(self, x: Tensor, weight: Weight, out_features: int, bias: Tensor | None = None) -> Tensor:
        k = x.shape[-1]
        decoder = _Decoder(weight)
        parts = []
        for first, last in numerics.row_chunks(out_features, k, weight.blocksize):
            w = decoder.range(first * k, last * k, x.dtype).view(last - first, k)
            parts.append(functional.linear(x, w, None if bias is None else bias[first:last]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def linear_4bit_grad(self, grad: Tensor, weight: Weight, in_features: int) -> Tensor:
        n = grad.shape[-1]
        decoder = _Decoder(weight)
        total: Tensor | None = None
        for first, last in numerics.row_chunks(n, in_features, weight.blocksize):
            w = decoder.range(first * in_features, last * in_features, grad.dtype).view(-1, in_features)
            part = grad[..., first:last] @ w
            if last - first == n:
                return part
            total = part.float() if total is None else total.add_(part)  # one rounding, not one a chunk
        assert total is not None
        return total.to(grad.dtype)

    @subnormals_kept
    def embedding_4bit(
        self, ids: Tensor, weight: Weight, num_embeddings: int, embedding_dim: int, dtype: torch.dtype
    ) -> Tensor:
        rows = ids.reshape(-1).long()
        _check_ids(rows, num_embeddings)
        decoder = _Decoder(weight)
        out = torch.empty(rows.numel(), embedding_dim, dtype=dtype, device=ids.device)
        step = max(numerics.CHUNK // embedding_dim, 1)
        for start in range(0, rows.numel(), step):
            out[start : start + step] = decoder.rows(rows[start : start + step], embedding_dim)
        return out.view(*ids.shape, embedding_dim)


def _check_ids(rows: Tensor, count: int) -> None:
    bad = (rows < 0) | (rows >= count)
    if rows.device.type != "cpu":
        torch._assert_async(~bad.any(), f"embedding_4bit: an id is out of range for {count} rows")
    elif bool(bad.any()):
        first = int(bad.nonzero()[0, 0])
        raise IndexError(f"embedding_4bit: id {int(rows[first])} (position {first}) is out of range for {count} rows")


class _Decoder:
    """Float32 values of any part of a packed weight."""

    def __init__(self, weight: Weight) -> None:
        self.packed = weight.packed.reshape(-1)
        self.code = code = weight.code
        self.blocksize = weight.blocksize
        self.absmax = weight.scales().reshape(-1)
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
