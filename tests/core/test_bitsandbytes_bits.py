"""The same bits as the real bitsandbytes: packed bytes, scales and values, in every dtype and at every threshold.

Left out, since bitsandbytes' own paths do not agree there: the sign of FP4's zero (its CPU path stores codes 0
and 8, its CUDA path 0 alone), thresholds in a short last block (its CPU path divides by the scale instead of
multiplying by 1/scale, so such an element may fall on the other side), and its CPU path's
dequantization where the last dimension is a multiple of 16 but not of the blocksize (wrong values).
"""

from __future__ import annotations

import pytest
import torch

import fourbit
from fourbit.codebooks import get, thresholds
from tests.support import skip_or_fail

try:
    import bitsandbytes.functional as bnb
except ImportError:
    bnb = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@pytest.fixture(autouse=True)
def _needs_bitsandbytes():
    if bnb is None:
        skip_or_fail("bitsandbytes is not installed: its bits are not compared")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def at_thresholds(quant_type: str, blocksize: int, scale: float) -> torch.Tensor:
    """Blocks with absmax `scale` that hold each threshold, its neighbours one ulp away, and each code value."""
    table = get(quant_type).tensor()
    edges, _ = thresholds(table)
    inf = torch.tensor(torch.inf)
    values = torch.cat([edges, torch.nextafter(edges, inf), torch.nextafter(edges, -inf), table])
    per_block = blocksize - 1
    blocks = -(-values.numel() // per_block)
    padded = torch.nn.functional.pad(values, (0, blocks * per_block - values.numel()))
    return torch.cat([padded.view(blocks, per_block), torch.ones(blocks, 1)], dim=1) * scale


def assert_same_bits(w: torch.Tensor, quant_type: str, blocksize: int) -> None:
    theirs, their_state = bnb.quantize_4bit(w, blocksize=blocksize, quant_type=quant_type)
    packed, state = fourbit.quantize_4bit(w, quant_type=quant_type, blocksize=blocksize)
    assert torch.equal(state.absmax, their_state.absmax)
    if quant_type == "nf4":
        assert torch.equal(packed, theirs)
    else:
        assert torch.equal(positive_zero(packed), positive_zero(theirs))
        assert 8 not in nibbles(packed)
    their_values = bnb.dequantize_4bit(theirs, their_state)
    assert torch.equal(fourbit.dequantize_4bit(packed, state), their_values)
    # and either reads what the other wrote
    assert torch.equal(fourbit.dequantize_4bit(theirs, state), their_values)


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten()


def positive_zero(packed: torch.Tensor) -> torch.Tensor:
    codes = nibbles(packed)
    return torch.where(codes == 8, torch.zeros_like(codes), codes)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_weights(quant_type, dtype):
    for blocksize in BLOCKSIZES:
        assert_same_bits(randn(4, 4096, seed=blocksize).to(dtype), quant_type, blocksize)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 3.0, 0.37, 1e-3, 512.0])
def test_at_every_threshold(quant_type, dtype, scale):
    for blocksize in (32, 64, 256):
        assert_same_bits(at_thresholds(quant_type, blocksize, scale).to(dtype), quant_type, blocksize)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nf4_with_a_short_last_block(dtype):
    w = randn(33, 65, seed=1).to(dtype)
    assert w.numel() % 64 and w.numel() % 2
    assert_same_bits(w, "nf4", 64)


def test_heavy_tails_zeros_and_subnormal_free_ranges():
    w = randn(64, 256, seed=2) / randn(64, 256, seed=3).abs().clamp(min=1e-4)
    w[::7] = 0
    w[3] *= 1e-20
    w[4] *= 1e20
    packed, state = fourbit.quantize_4bit(w, blocksize=64)
    theirs, their_state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    assert torch.equal(packed, theirs) and torch.equal(state.absmax, their_state.absmax)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_state_dicts_are_read_by_either_side(quant_type, nested):
    w = randn(256, 512, seed=4).bfloat16()
    packed, state = fourbit.quantize_4bit(w, quant_type=quant_type, blocksize=64, double_quant=nested)
    ours = state.to_state_dict("")
    their_state = bnb.QuantState.from_dict(dict(ours), device=torch.device("cpu"))
    values = fourbit.dequantize_4bit(packed, state)
    assert torch.equal(bnb.dequantize_4bit(packed, their_state), values)

    theirs, their_state = bnb.quantize_4bit(w, blocksize=64, quant_type=quant_type, compress_statistics=nested)
    read = fourbit.QuantState.from_state_dict(their_state.as_dict(packed=True), prefix="")
    assert (read.quant_type, read.dtype, read.shape) == (quant_type, torch.bfloat16, w.shape)
    assert torch.equal(fourbit.dequantize_4bit(theirs, read), bnb.dequantize_4bit(theirs, their_state))
