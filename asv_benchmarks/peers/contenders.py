"""What is timed: fourbit and its peers, each as a list of calls, one for each cold copy of its weight.

bitsandbytes runs its packed path, Linear4bit in evaluation mode. That path computes in bfloat16 whatever it is asked
for, repacks the weight in place, and takes only N a multiple of 32 and K a multiple of 64; `Bitsandbytes` keeps to
that. Each weight is quantized by the library that multiplies with it, and each contender's product is compared with
that of its own dequantized weight before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import linear

import fourbit
from harness.weights import BLOCKSIZE, DTYPES, Weights, bind

TOLERANCE = {"bf16": 0.01, "fp16": 0.002, "fp32": 1e-5}
"""Of the product's relative error in the Frobenius norm; that a contender computes the right thing, not how well."""

Calls = list[Callable[[], object]]


class CpuWeights(Weights):
    """With the forms of the peers that run on a CPU."""

    def bitsandbytes(self) -> list[Any]:
        """Modules in evaluation mode whose weight has been repacked; empty if it cannot take the shape."""
        out_features, in_features = self.shape
        if self.bnb is None or out_features % 32 or in_features % 64:
            return []

        def build() -> tuple[Any, int]:
            module = self.bnb.nn.Linear4bit(
                *(in_features, out_features),
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                compress_statistics=False,
                device="meta",
            )
            module.weight = self.bnb.nn.Params4bit(
                *(self.plain, False), quant_type="nf4", compress_statistics=False, blocksize=BLOCKSIZE, module=module
            )
            module = module.to("cpu").eval()
            module(torch.zeros(1, in_features, dtype=torch.bfloat16))
            state = module.weight.quant_state
            return module, module.weight.nbytes + state.absmax.nbytes

        return self.copies("bitsandbytes", build)

    def int4pack(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """`(packed, scales and zeros)` of torch's own 4-bit op: integers 0 … 15 in groups of 64."""

        def build() -> tuple[Any, int]:
            scale, codes = self.int4_codes()
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(self.shape), 1)
            both = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous()
            return (packed, both), packed.nbytes + both.nbytes

        return self.copies("int4pack", build) if self.shape[1] % BLOCKSIZE == 0 else []

    def int4_codes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales bfloat16 [N, K/64] and codes int32 [N, K/64, 64] of int4pack's weight, (code - 8) * scale."""
        groups = self.plain.view(self.shape[0], -1, BLOCKSIZE)
        scale = (groups.abs().amax(-1) / 7.5).bfloat16()
        return scale, (groups / scale.float()[..., None]).round_().add_(8).clamp_(0, 15).int()


def linear_calls(weights: CpuWeights, x: torch.Tensor, peers: bool = True) -> dict[str, Calls]:
    """Contenders for x [M, K] times the weight, by name; `peers` False leaves fourbit and torch."""
    dtype = next(name for name, kind in DTYPES.items() if kind is x.dtype)
    found: dict[str, Calls] = {
        "fourbit": [bind(fourbit.linear_4bit, x, *w) for w in weights.fourbit()],
        f"torch {dtype}": [bind(linear, x, w) for w in weights.torch(dtype)],
    }
    if dtype == "bf16" and peers:
        if x.shape[0] == 1:
            found["fourbit double"] = [bind(fourbit.linear_4bit, x, *w) for w in weights.fourbit(double_quant=True)]
        found["bitsandbytes"] = [bind(module, x) for module in weights.bitsandbytes()]
        int4 = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        found["int4pack"] = [bind(int4, x, w, BLOCKSIZE, scales) for w, scales in weights.int4pack()]
    return {name: calls for name, calls in found.items() if calls}


def composed_calls(weights: CpuWeights, x: torch.Tensor) -> Calls:
    """dequantize_4bit, then torch's linear: what a user without a fused kernel has."""

    def call(packed: torch.Tensor, state: fourbit.QuantState) -> torch.Tensor:
        return linear(x, fourbit.dequantize_4bit(packed, state, x.dtype))

    return [bind(call, *w) for w in weights.fourbit()]


def check(contenders: dict[str, Calls], weights: CpuWeights, x: torch.Tensor, dtype: str) -> None:
    """Compare each product with that of the plain weight dequantized as the contender did; raise on a wrong one."""
    ends = torch.cat([torch.arange(128), torch.arange(weights.shape[0] - 128, weights.shape[0])])
    for name, calls in contenders.items():
        want = x.double() @ _dequantized(name, weights, dtype)[ends].double().t()
        results = [calls[0](), calls[-1]()]
        for result in results:
            assert isinstance(result, torch.Tensor)
            error = float((result[:, ends].double() - want).norm() / want.norm())
            if not error <= TOLERANCE[dtype]:
                raise RuntimeError(f"{name} computes something else: relative error {error:.2e}, {dtype}")


def _dequantized(name: str, weights: CpuWeights, dtype: str) -> torch.Tensor:
    """The weight in float32 that a contender multiplies with."""
    if name.startswith("torch"):
        return weights.torch(dtype)[0]
    if name == "int4pack":
        scale, codes = weights.int4_codes()
        return ((codes - 8) * scale.float()[..., None]).view(weights.shape)
    packed, state = weights.fourbit(name == "fourbit double")[0]
    if name == "bitsandbytes":  # its NF4 bits are fourbit's, but it keeps the scales in bfloat16
        state = replace(state, absmax=state.absmax.bfloat16().float())
    return fourbit.dequantize_4bit(packed, state, torch.float32)
