"""Quantize, dequantize and linear, on whichever backend serves the CPU."""

from __future__ import annotations

import torch

import fourbit

SIZES = [1024, 2048]


class Quantize:
    params = (["nf4", "fp4"], [False, True], SIZES)
    param_names = ("quant_type", "double_quant", "size")

    def setup(self, quant_type, double_quant, size):
        self.weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).bfloat16()
        self.options = {"quant_type": quant_type, "double_quant": double_quant, "blocksize": 64}
        self.packed, self.state = fourbit.quantize_4bit(self.weight, **self.options)

    def time_quantize(self, *_):
        fourbit.quantize_4bit(self.weight, **self.options)

    def time_dequantize(self, *_):
        fourbit.dequantize_4bit(self.packed, self.state)


class Linear:
    params = ([1, 4, 16, 128], SIZES, ["float32", "bfloat16"])
    param_names = ("rows", "size", "dtype")

    def setup(self, rows, size, dtype):
        generator = torch.Generator().manual_seed(0)
        self.packed, self.state = fourbit.quantize_4bit(torch.randn(size, size, generator=generator), blocksize=64)
        self.x = torch.randn(rows, size, generator=generator).to(getattr(torch, dtype))
        self.weight = fourbit.dequantize_4bit(self.packed, self.state, self.x.dtype)

    def time_linear_4bit(self, *_):
        fourbit.linear_4bit(self.x, self.packed, self.state)

    def time_torch_linear_16_or_32_bit(self, *_):
        """The same product with the weight unpacked beforehand."""
        torch.nn.functional.linear(self.x, self.weight)
