"""The reference's numbers: an oracle written independently, expected errors, ties, odd values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fourbit
from fourbit.codebooks import FP4, NF4, Codebook, thresholds
from fourbit.numerics import CHUNK, nearest
from fourbit.reference import ReferenceBackend

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NF4_ERRORS = (0.067746, 0.072798, 0.076831, 0.080337, 0.083547, 0.086610, 0.089592, 0.092547)
FP4_ERRORS = (0.088925, 0.096543, 0.102969, 0.108684, 0.114115, 0.119333, 0.124556, 0.129536)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unpack(packed: torch.Tensor, count: int) -> list[int]:
    """Codes from packed bytes: element 2i in the high nibble of byte i."""
    return [code for byte in packed.flatten().tolist() for code in (byte >> 4, byte & 15)][:count]


# ---- the oracle ----------------------------------------------------------------------------------


def oracle(w: torch.Tensor, values: tuple[float, ...], blocksize: int) -> tuple[list[int], list[float], list[float]]:
    """Codes, scales and values by brute force, one element at a time: distances in float64."""
    table = np.array(values, dtype=np.float32)
    flat = w.float().flatten().numpy()
    codes: list[int] = []
    scales: list[float] = []
    result: list[float] = []
    for start in range(0, len(flat), blocksize):
        block = flat[start : start + blocksize]
        absmax = np.float32(np.max(np.abs(block)))
        scales.append(float(absmax))
        inverse = np.float32(1) / absmax if absmax else np.float32(0)
        for element in block:
            distances = np.abs(table.astype(np.float64) - np.float64(element * inverse))
            # of equally near entries the lower value, and of equal values the lower code
            code = min(range(16), key=lambda c: (distances[c], table[c], c))
            codes.append(code)
            result.append(float(table[code] * absmax))
    return codes, scales, result


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("shape", "blocksize"), [((7, 96), 32), ((3, 333), 64), ((1025,), 128), ((2, 5, 64), 256), ((1,), 32), ((33,), 32)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_oracle(name, shape, blocksize, dtype):
    w = randn(*shape, seed=sum(shape)).to(dtype)
    w.view(-1)[::17] = 0
    packed, state = fourbit.quantize_4bit(w, quant_type=name, blocksize=blocksize)
    codes, scales, values = oracle(w, (NF4 if name == "nf4" else FP4).values, blocksize)
    assert unpack(packed, w.numel()) == codes
    assert state.absmax.tolist() == scales
    out = fourbit.dequantize_4bit(packed, state, torch.float32)
    assert out.shape == w.shape and out.flatten().tolist() == values
    assert torch.equal(fourbit.dequantize_4bit(packed, state), out.to(dtype))  # one rounding from float32


def test_any_codebook_equals_the_oracle():
    values = (0.3, -1.0, 0.0, 0.9, -0.2, 0.55, 0.1, -0.7, 0.0, 0.45, -0.33, 0.75, -0.05, 0.6, -0.9, 0.2)
    w = randn(40, 32, seed=9)
    packed, absmax = torch.ops.fourbit.quantize_4bit(w, Codebook("any", values).tensor(), 64)
    codes, scales, _ = oracle(w, values, 64)
    assert unpack(packed, w.numel()) == codes and absmax.tolist() == scales


def test_a_signed_scale_keeps_the_sign_of_the_largest_element():
    code = Codebook("halves", (*(-1 + i / 8 for i in range(15)), 0.9), signed_scale=True).tensor()
    w = torch.zeros(4, 32)
    w[0, 3], w[0, 4] = -2.0, 1.0
    w[1, 3], w[1, 4] = -1.0, 2.0
    w[2, 3], w[2, 4] = -2.0, 2.0  # both signs reach it: the positive one
    packed, absmax = torch.ops.fourbit.quantize_4bit(w, code, 32, True)
    assert absmax.tolist() == [-2.0, 2.0, 2.0, 0.0]
    out = torch.ops.fourbit.dequantize_4bit(packed, absmax, code, 32, w.shape, torch.float32)
    assert (out[0, 3], out[0, 4]) == (-1.8, 1.0)  # -2 normalizes to 1, whose nearest entry is 0.9


# ---- expected errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "errors"), [("nf4", NF4_ERRORS), ("fp4", FP4_ERRORS)])
def test_mean_error_on_normal_weights(name, errors):
    w = randn(2**23, seed=1)  # enough that 2048 blocks of 4096 average out
    for blocksize, expected in zip(BLOCKSIZES, errors, strict=True):
        packed, state = fourbit.quantize_4bit(w, quant_type=name, blocksize=blocksize)
        error = (fourbit.dequantize_4bit(packed, state) - w).abs().mean()
        assert float(error) == pytest.approx(expected, rel=4e-3), blocksize


def test_double_quantization_adds_little_error():
    w = randn(1024, 1024, seed=2)
    errors = []
    for nested in (False, True):
        packed, state = fourbit.quantize_4bit(w, blocksize=64, double_quant=nested)
        errors.append(float((fourbit.dequantize_4bit(packed, state) - w).abs().mean()))
    assert errors[0] < errors[1] < errors[0] * 1.02


# ---- thresholds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook", [NF4, FP4], ids=lambda c: c.name)
def test_at_a_threshold_the_lower_value_wins(codebook):
    edges, codes = thresholds(codebook.tensor())
    above = torch.nextafter(edges, torch.tensor(2.0))
    below = torch.nextafter(edges, torch.tensor(-2.0))
    assert torch.equal(nearest(edges, codebook.tensor()), codes[:-1])
    assert torch.equal(nearest(below, codebook.tensor()), codes[:-1])
    assert torch.equal(nearest(above, codebook.tensor()), codes[1:])


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_every_code_value_maps_to_its_own_code(name):
    codebook = NF4 if name == "nf4" else FP4
    w = torch.tensor([*codebook.values, *codebook.values])
    packed, state = fourbit.quantize_4bit(w, quant_type=name, blocksize=32)
    assert torch.equal(fourbit.dequantize_4bit(packed, state), w.abs() * w.sign())


# ---- odd values and sizes ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_zeros(name):
    zero = 7 if name == "nf4" else 0
    for w in (torch.zeros(3, 40), -torch.zeros(3, 40)):
        packed, state = fourbit.quantize_4bit(w, quant_type=name, blocksize=32)
        assert set(unpack(packed, 120)) == {zero}
        assert not state.absmax.any() and not torch.signbit(state.absmax).any()
        assert not fourbit.dequantize_4bit(packed, state).any()


def test_an_odd_count_is_padded_with_the_code_of_zero():
    for count in (1, 31, 65, 97):
        packed, _ = fourbit.quantize_4bit(torch.ones(count), blocksize=32)
        assert packed.shape == ((count + 1) // 2, 1) and int(packed[-1]) == 0xF7
        packed, _ = fourbit.quantize_4bit(torch.ones(count), quant_type="fp4", blocksize=32)
        assert int(packed[-1]) == 0x30


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_block_is_nan_and_the_others_are_right(bad, dtype):
    w = randn(8, 64, seed=3, dtype=dtype)
    spoiled = w.clone()
    spoiled[2, 10] = spoiled[7, 63] = bad
    packed, state = fourbit.quantize_4bit(spoiled, blocksize=64)
    whole = fourbit.dequantize_4bit(*fourbit.quantize_4bit(w, blocksize=64))
    out = fourbit.dequantize_4bit(packed, state)
    good = [0, 1, 3, 4, 5, 6]
    assert out[[2, 7]].isnan().all() and torch.equal(out[good], whole[good])
    assert set(unpack(packed[64:96], 64)) == {7}  # such a block's codes are those of zero on every backend


@pytest.mark.parametrize("top", [2.0**-149, 2.0**-140, 2.0**-128, 2.0**-127, 2.0**-126, 1e-30, 1e30, 3.4e38])
def test_tiny_and_huge_blocks(top):
    """1/absmax overflows below 2^-128; such a block must not become Inf or NaN."""
    w = torch.tensor([top, -top, top, 0.0] * 16)
    packed, state = fourbit.quantize_4bit(w, blocksize=64)
    assert torch.equal(fourbit.dequantize_4bit(packed, state), w)
    half = torch.tensor([top, -top / 2, top / 3, 0.0] * 16)
    out = fourbit.dequantize_4bit(*fourbit.quantize_4bit(half, blocksize=64))
    assert out.isfinite().all() and (out - half).abs().max() <= 0.153 * top + 2.0**-149


def test_chunks_change_nothing(monkeypatch):
    """More elements than one chunk, the last of them ragged: the same bits as in one go."""
    w = randn(3 * 4096 + 77, seed=4)
    whole = fourbit.quantize_4bit(w, blocksize=64)
    monkeypatch.setattr("fourbit.numerics.CHUNK", 4096)
    packed, state = fourbit.quantize_4bit(w, blocksize=64)
    assert torch.equal(packed, whole[0]) and torch.equal(state.absmax, whole[1].absmax)
    assert torch.equal(fourbit.dequantize_4bit(packed, state), fourbit.dequantize_4bit(*whole))
    assert CHUNK > 4096


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_inputs_quantize_as_their_float32_values(dtype):
    w = randn(33, 65, seed=5, dtype=dtype)
    half, half_state = fourbit.quantize_4bit(w, blocksize=32)
    full, full_state = fourbit.quantize_4bit(w.float(), blocksize=32)
    assert torch.equal(half, full) and torch.equal(half_state.absmax, full_state.absmax)
    assert half_state.dtype == dtype


def test_a_second_round_changes_nothing():
    w = randn(64, 96, seed=6)
    packed, state = fourbit.quantize_4bit(w, blocksize=32)
    again, second = fourbit.quantize_4bit(fourbit.dequantize_4bit(packed, state), blocksize=32)
    assert torch.equal(again, packed) and torch.equal(second.absmax, state.absmax)


# ---- 8 bits --------------------------------------------------------------------------------------


def test_blockwise_is_truly_nearest():
    """Also on heavy tails, where bitsandbytes' CPU path picks another entry for 29 % of the elements."""
    x = randn(4000, seed=8) / randn(4000, seed=9).abs().clamp(min=1e-3)
    codes, absmax = fourbit.quantize_blockwise(x, blocksize=256)
    table = np.array(fourbit.codebooks.DYNAMIC_VALUES, dtype=np.float64)
    scale = absmax.repeat_interleave(256)[: x.numel()].numpy()
    normalized = (x.numpy() * (np.float32(1) / scale)).astype(np.float64)
    distance = np.abs(table[None, :] - normalized[:, None])
    chosen = distance[np.arange(x.numel()), codes.numpy()]
    # an edge is a float32 midpoint: off by half an ulp from the true one
    assert np.all(chosen <= distance.min(axis=1) + 2.0**-24 * np.abs(normalized) + 1e-12)
    out = fourbit.dequantize_blockwise(codes, absmax)
    assert np.array_equal(out.numpy(), table[codes.numpy()].astype(np.float32) * scale)


def test_blockwise_takes_any_table_and_shape():
    table = torch.linspace(-1, 1, 256)
    x = randn(3, 5, 7, seed=7)
    codes, absmax = fourbit.quantize_blockwise(x, code=table, blocksize=64)
    assert codes.shape == x.shape and absmax.shape == (2,)
    out = fourbit.dequantize_blockwise(codes, absmax, code=table, blocksize=64, dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16 and (out - x).abs().max() < absmax.max() / 64


def test_reference_serves_every_device():
    assert ReferenceBackend.device_types == ("*",) and ReferenceBackend.priority == 0
