"""The weights that the CUDA kernel for many rows multiplies with where it looks two bfloat16 codes up at once."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import fourbit
from fourbit.state import QuantState


def pair_weights(packed: Tensor, state: QuantState) -> Tensor:
    """bfloat16 [state.shape]: codes rounded to it, times the scale as the sum of two, as matmul_bytes.h has it."""
    scales = fourbit.dequantize_4bit(packed, replace(state, code=torch.ones_like(state.code)), torch.float32)
    bytes_ = packed.flatten().int()
    codes = torch.stack([bytes_ >> 4, bytes_ & 15], 1).flatten()[: scales.numel()]
    code = state.code.bfloat16().double()[codes].view(scales.shape)
    high = (scales.view(torch.int32) & -0x10000).view(torch.float32)
    low = (scales - high).bfloat16().double()
    # a product of two bfloat16 is a double, and so is the sum of two such
    return (code * high.double() + (code * low).bfloat16().double()).bfloat16()
