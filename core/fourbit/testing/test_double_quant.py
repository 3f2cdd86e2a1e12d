"""Double quantization: the scales in 8 bits, with the offset and the nested scales of the reference."""

from __future__ import annotations

import pytest
import torch

import fourbit
from fourbit.testing import inputs
from fourbit.testing.inputs import BLOCKSIZES, DTYPES, normal
from fourbit.testing.oracle import assert_same_bits, make_weight

COVERS = ("quantize_4bit", "quantize_blockwise", "dequantize_4bit")


def check(w: torch.Tensor, device: torch.device, quant_type: str = "nf4", blocksize: int = 64) -> None:
    """Compare every tensor of the state, and the way back, with the reference's."""
    packed, state = fourbit.quantize_4bit(w.to(device), quant_type=quant_type, blocksize=blocksize, double_quant=True)
    weight = make_weight(*w.shape, codebook=quant_type, blocksize=blocksize, double_quant=True, values=w)
    want = weight.state("cpu", w.dtype)
    assert state.double_quant and state.shape == w.shape and state.dtype == w.dtype
    assert_same_bits(packed, weight.packed, "packed")
    for name in ("nested_offset", "nested_code", "nested_absmax", "absmax"):
        assert_same_bits(getattr(state, name), getattr(want, name), name)
    out = fourbit.dequantize_4bit(packed, state)
    assert_same_bits(out, weight.dense(w.dtype), f"dequantized to {w.dtype}")


def need_all(need, dtype=torch.float32, blocksize=64):
    need("quantize_4bit", dtype, blocksize)
    need("quantize_blockwise")
    need("dequantize_4bit", dtype, blocksize, True)


@pytest.mark.parametrize("quant_type", ("nf4", "fp4"))
@pytest.mark.parametrize("blocks", (1, 2, 255, 256, 257, 1000))
def test_counts_of_blocks(need, device, blocks, quant_type):
    """Below, at and above the 256 scales that share a nested scale."""
    need_all(need)
    check(normal(blocks * 64 - 5), device, quant_type)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize(need, device, blocksize, dtype):
    need_all(need, dtype, blocksize)
    check(normal(9 * blocksize + 3).to(dtype), device, blocksize=blocksize)


@pytest.mark.parametrize("name", [name for name in inputs.PLAIN if name != "largest float"])
def test_same_bits(need, device, name):
    need_all(need)
    check(inputs.PLAIN[name](64 * 300 + 7), device)


def test_scales_of_many_magnitudes(need, device):
    """The mean of the scales depends on the order of a float32 sum; the stored offset must not."""
    need_all(need)
    scales = 10.0 ** torch.linspace(-6, 6, 1000)
    check(normal(1000, 64) * scales[torch.randperm(1000, generator=inputs.generator())][:, None], device)


def test_non_finite(need, device):
    need_all(need)
    check(inputs.non_finite(64)[0], device)


def test_large(need, device):
    """65,537 blocks and a short one: the offset is a sum that a float32 accumulator gets wrong."""
    need_all(need)
    check(normal(65537, 64).abs().add_(1).view(-1)[:-3], device)
