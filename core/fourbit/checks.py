"""Argument checks of the ops: what is wrong, with which argument, what was wanted. Cheap enough for every call."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIN_BLOCKSIZE, MAX_BLOCKSIZE = 32, 4096


def blocksize(op: str, value: object) -> None:
    """A power of two from 32 to 4096."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{op}: blocksize must be an int, got {type(value).__name__}")
    if not MIN_BLOCKSIZE <= value <= MAX_BLOCKSIZE or value & (value - 1):
        raise ValueError(f"{op}: blocksize must be a power of two from {MIN_BLOCKSIZE} to {MAX_BLOCKSIZE}, got {value}")


def source(op: str, name: str, tensor: Tensor) -> None:
    """A tensor that can be quantized."""
    if tensor.dtype not in COMPUTE_DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    if tensor.dim() == 0:
        raise ValueError(f"{op}: {name} has no dimensions; want at least one (shape [n])")
    if tensor.numel() == 0:
        raise ValueError(f"{op}: {name} is empty, shape {list(tensor.shape)}")


def compute_dtype(op: str, dtype: torch.dtype) -> None:
    """A dtype of results."""
    if dtype not in COMPUTE_DTYPES:
        raise TypeError(f"{op}: dtype must be float32, bfloat16 or float16, got {dtype}")


def activations(op: str, name: str, x: Tensor) -> None:
    """The floating-point side of a linear op."""
    if x.dtype not in COMPUTE_DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: {name} must have a last dimension of features, got shape {list(x.shape)}")


def integers(op: str, name: str, ids: Tensor) -> None:
    """Row numbers or offsets."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: {name} must be int32 or int64, got {ids.dtype}")


def code(op: str, table: Tensor, size: int, device: torch.device) -> None:
    """A codebook of `size` float32 values on `device`."""
    if table.dtype != torch.float32 or table.numel() != size or table.dim() != 1:
        raise ValueError(f"{op}: code must be float32 [{size}], got {table.dtype} {list(table.shape)}")
    if table.device != device:
        wrong_device(op, "code", table, device)


def bias(op: str, value: Tensor, out_features: int, x: Tensor) -> None:
    """A bias that fits a linear op."""
    if value.dim() != 1 or value.shape[0] != out_features:
        raise ValueError(f"{op}: bias must have shape [{out_features}], got {list(value.shape)}")
    if value.dtype != x.dtype:
        raise TypeError(f"{op}: bias is {value.dtype} and x is {x.dtype}; want the same")
    if value.device != x.device:
        wrong_device(op, "bias", value, x.device)


def group_offsets(op: str, offsets: Tensor, x: Tensor) -> None:
    """Expert offsets that fit x [T, K]. Their values are the caller's business, as for torch's grouped matmul."""
    if x.dim() != 2:
        raise ValueError(f"{op}: the rows must be 2-D [tokens, features], got shape {list(x.shape)}")
    if offsets.dim() != 1 or offsets.numel() == 0:
        raise ValueError(f"{op}: offsets must be 1-D with one entry an expert, got shape {list(offsets.shape)}")
    if offsets.device != x.device:
        wrong_device(op, "offsets", offsets, x.device)
    if offsets.device.type == "cpu":
        # neighbours are compared, not subtracted: a difference of two integers of 64 bits may wrap
        rising = bool((offsets[:-1] <= offsets[1:]).all())
        if not rising or int(offsets[0]) < 0 or int(offsets[-1]) > x.shape[0]:
            raise ValueError(f"{op}: offsets must rise from 0 to at most {x.shape[0]} rows, got {offsets.tolist()}")


def given_scales(op: str, scales: Tensor, w: Tensor, size: int) -> None:
    """Scales that take the place of absmax in quantizing `w`; whether they are finite is not looked at."""
    blocks = -(-w.numel() // size)
    if scales.dtype != torch.float32 or scales.numel() != blocks:
        raise ValueError(
            f"{op}: scales must be float32 with {blocks} elements, one a block of {size},"
            f" got {scales.dtype} {list(scales.shape)}"
        )
    if scales.device != w.device:
        wrong_device(op, "scales", scales, w.device)


def blockwise(op: str, codes: Tensor, absmax: Tensor, table: Tensor, size: int) -> None:
    """The arguments of `dequantize_blockwise`."""
    blocksize(op, size)
    if codes.dtype != torch.uint8:
        raise TypeError(f"{op}: codes must be uint8, got {codes.dtype}")
    blocks = -(-codes.numel() // size)
    if absmax.dtype != torch.float32 or absmax.numel() != blocks:
        wrong_absmax(op, absmax, blocks, False, codes.numel(), size)
    if absmax.device != codes.device:
        wrong_device(op, "absmax", absmax, codes.device)
    code(op, table, 256, codes.device)


def wrong_device(op: str, name: str, tensor: Tensor, device: torch.device) -> NoReturn:
    """Raise the ValueError for `tensor`, which is not on `device` as the other arguments are."""
    raise ValueError(f"{op}: {name} is on {tensor.device} and the rest is on {device}; move one of them")


def wrong_absmax(op: str, absmax: Tensor, blocks: int, nested: bool, count: int, size: int) -> NoReturn:
    """Raise the ValueError for scales that do not fit `count` elements in blocks of `size`."""
    kind = "uint8 (double-quantized)" if nested else "float32"
    raise ValueError(
        f"{op}: absmax must be {kind} with {blocks} scales for {count} elements in blocks of {size},"
        f" got {absmax.dtype} {list(absmax.shape)}"
    )
