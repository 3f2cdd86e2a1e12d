"""The ops on fake and meta tensors, shapes and dtypes alone: for torch.compile, FakeTensor and export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fourbit import checks, double_quant


def _blocks(count: Any, blocksize: int) -> Any:
    return (count + blocksize - 1) // blocksize


def quantize_4bit(w: Tensor, code: Tensor, blocksize: int, signed_scale: bool = False) -> tuple[Tensor, Tensor]:
    checks.source("quantize_4bit", "w", w)
    checks.blocksize("quantize_4bit", blocksize)
    n = w.numel()
    absmax = w.new_empty((_blocks(n, blocksize),), dtype=torch.float32)
    return w.new_empty(((n + 1) // 2, 1), dtype=torch.uint8), absmax


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype, *_: Any
) -> Tensor:
    return packed.new_empty(tuple(shape), dtype=dtype)


def linear_4bit(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, out_features: int, *_: Any, **__: Any
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def embedding_4bit(
    ids: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    num_embeddings: int,
    embedding_dim: int,
    dtype: torch.dtype,
    *_: Any,
) -> Tensor:
    return ids.new_empty((*ids.shape, embedding_dim), dtype=dtype)


def grouped_linear_4bit(
    x: Tensor, offsets: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, blocksize: int, width: int, *_: Any
) -> Tensor:
    return x.new_empty((x.shape[0], width))


def quantize_blockwise(x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    absmax = x.new_empty((_blocks(x.numel(), blocksize),), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.uint8), absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def double_quantize(absmax: Tensor, code: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = absmax.numel()
    return (
        absmax.new_empty((n,), dtype=torch.uint8),
        absmax.new_empty((_blocks(n, double_quant.NESTED_BLOCKSIZE),), dtype=torch.float32),
        absmax.new_empty((256,), dtype=torch.float32),
        absmax.new_empty((), dtype=torch.float32),
    )


FAKES: dict[str, Callable[..., Any]] = {
    "quantize_4bit": quantize_4bit,
    "dequantize_4bit": dequantize_4bit,
    "linear_4bit": linear_4bit,
    "linear_4bit_grad": linear_4bit,
    "embedding_4bit": embedding_4bit,
    "grouped_linear_4bit": grouped_linear_4bit,
    "grouped_linear_4bit_grad": grouped_linear_4bit,
    "quantize_blockwise": quantize_blockwise,
    "dequantize_blockwise": dequantize_blockwise,
    "double_quantize": double_quantize,
}


def on_one_device(op: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake`, after a check that no tensor lies elsewhere: a call with one on the meta device comes here too."""
    names = [argument.name for argument in getattr(torch.ops.fourbit, op).default._schema.arguments]

    def checked(*args: Any, **kwargs: Any) -> Any:
        tensors = [(name, t) for name, t in (*zip(names, args, strict=False), *kwargs.items()) if isinstance(t, Tensor)]
        for name, tensor in tensors:
            if tensor.device != tensors[0][1].device:
                # named is the one on meta, since it came by mistake where the rest is real
                other = next((pair for pair in tensors if pair[1].is_meta), (name, tensor))
                rest = next(t for _, t in tensors if t.device != other[1].device)
                checks.wrong_device(op, *other, rest.device)
        return fake(*args, **kwargs)

    return checked
