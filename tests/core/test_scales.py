"""Scales in 8 bits: the exact mean, NaN scales, and what a parameter costs."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import fourbit
from fourbit import codebooks, scales
from fourbit.numerics import quantize_blockwise
from fourbit.scales import DOUBLE, FLOAT32, NAN_CODE, NESTED_BLOCKSIZE, decode, double_quantize, exact_mean

SUBNORMAL = 2.0**-149
LARGEST = float(np.finfo(np.float32).max)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def round_to_float32(value: Fraction) -> float:
    """The float32 nearest to an exact fraction, ties to even: float64 arithmetic would round twice."""
    if value == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(value))) - 23, -149)
    unit = Fraction(2) ** exponent
    while abs(value) / unit >= 2**24:
        unit *= 2
    while abs(value) / unit < 2**23 and unit > Fraction(2) ** -149:
        unit /= 2
    return float(round(value / unit) * unit)  # round() of a Fraction goes to even


# ---- the mean ------------------------------------------------------------------------------------


@given(st.lists(floats, min_size=1, max_size=40))
@example([SUBNORMAL])
@example([SUBNORMAL, 0.0])
@example([SUBNORMAL] * 3 + [0.0])
@example([LARGEST] * 7)
@example([-LARGEST, LARGEST, SUBNORMAL])
@example([1.0, 2.0**-24])
@example([1.0, 2.0**-24 * 3, 0.0, 0.0])
@example([-3.0, 1.0, -0.0])
def test_mean_is_the_exact_one_rounded_once(values):
    mean = exact_mean(torch.tensor(values, dtype=torch.float32))
    assert mean == round_to_float32(sum(map(Fraction, values)) / len(values))


@given(st.lists(floats, min_size=2, max_size=40), st.randoms(use_true_random=False))
def test_mean_does_not_depend_on_the_order(values, rng):
    shuffled = values.copy()
    rng.shuffle(shuffled)
    assert exact_mean(torch.tensor(values)) == exact_mean(torch.tensor(shuffled))


def test_mean_of_many_and_of_none():
    values = torch.rand(300_001, generator=torch.Generator().manual_seed(0)) * 1e-3
    want = round_to_float32(sum(map(Fraction, values.tolist())) / values.numel())
    assert exact_mean(values) == want
    assert exact_mean(values[torch.randperm(values.numel())]) == want
    assert exact_mean(torch.empty(0)) == 0.0


def test_mean_of_a_view_with_strides():
    values = torch.arange(24, dtype=torch.float32).reshape(4, 6).T[::2]
    assert not values.is_contiguous()
    assert exact_mean(values) == float(values.double().mean())


# ---- encode and decode ---------------------------------------------------------------------------


def encode(scales: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return double_quantize(scales, codebooks.dynamic_map(), quantize_blockwise)


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 1000])
def test_round_trip_is_close_and_has_the_right_sizes(count):
    scales = torch.rand(count, generator=torch.Generator().manual_seed(count)) + 0.1
    codes, nested_absmax, nested_code, offset = encode(scales)
    assert (codes.dtype, codes.shape) == (torch.uint8, (count,))
    assert nested_absmax.shape == (-(-count // NESTED_BLOCKSIZE),)
    assert torch.equal(nested_code, codebooks.dynamic_map()) and offset.shape == ()
    decoded = decode(codes, nested_absmax, nested_code, offset)
    # the map's widest gap is 0.014, so half of it times the nested scale
    assert (decoded - scales).abs().max() <= 0.0071 * nested_absmax.max() + 1e-6


def test_decoding_is_the_formula_with_the_product_rounded_first():
    scales = torch.rand(600, generator=torch.Generator().manual_seed(1))
    codes, nested_absmax, nested_code, offset = encode(scales)
    decoded = decode(codes.view(20, 30), nested_absmax, nested_code, offset)
    table, nested = nested_code.numpy(), nested_absmax.numpy()
    want = [np.float32(table[c] * nested[i // 256]) + np.float32(offset) for i, c in enumerate(codes.tolist())]
    assert decoded.shape == (20, 30) and np.array_equal(decoded.numpy().ravel(), np.array(want))


def test_equal_scales_are_exact():
    scales = torch.full((300,), 0.37)
    assert torch.equal(decode(*encode(scales)), scales)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_scale_decodes_to_nan_and_harms_no_other(bad):
    scales = torch.rand(700, generator=torch.Generator().manual_seed(2))
    positions = [0, 255, 256, 699]
    spoiled = scales.clone()
    spoiled[positions] = bad
    codes, nested_absmax, nested_code, offset = encode(spoiled)
    decoded = decode(codes, nested_absmax, nested_code, offset)
    good = torch.ones(700, dtype=torch.bool)
    good[positions] = False
    assert decoded[~good].isnan().all() and decoded[good].isfinite().all()
    assert (decoded - scales)[good].abs().max() < 0.01
    assert float(offset) == exact_mean(scales[good])
    assert nested_code.isnan().nonzero().flatten().tolist() == [NAN_CODE]
    assert codebooks.dynamic_map().isfinite().all()  # the shared table was not written to


def test_the_nan_code_stands_for_next_to_nothing():
    assert abs(codebooks.DYNAMIC_VALUES[NAN_CODE]) < 1e-6 and codebooks.DYNAMIC_VALUES[NAN_CODE + 1] == 0


def test_only_bad_scales():
    codes, nested_absmax, nested_code, offset = encode(torch.full((3,), torch.nan))
    assert float(offset) == 0 and decode(codes, nested_absmax, nested_code, offset).isnan().all()


def test_a_weight_with_one_bad_element_through_double_quantization():
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    w[5, 7] = torch.inf
    packed, state = fourbit.quantize_4bit(w, blocksize=64, double_quant=True)
    y = fourbit.dequantize_4bit(packed, state)
    assert y[5].isnan().all() and y[torch.arange(64) != 5].isfinite().all()


# ---- what it costs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocksize", "nested", "bits"), [(64, False, 4.5), (64, True, 4.126953), (128, False, 4.25), (128, True, 4.063477)]
)
def test_bits_per_parameter(blocksize, nested, bits):
    count = 1024 * 1024
    _, state = fourbit.quantize_4bit(torch.ones(1024, 1024), blocksize=blocksize, double_quant=nested)
    assert state.bits_per_parameter == 8 * state.nbytes / count
    offset = 32 / count if nested else 0  # four bytes for the whole weight
    assert state.bits_per_parameter - offset == pytest.approx(bits, abs=5e-7)


def test_saving_of_double_quantization():
    w = torch.ones(2048, 1024)
    plain, nested = (fourbit.quantize_4bit(w, blocksize=64, double_quant=d)[1] for d in (False, True))
    assert plain.bits_per_parameter - nested.bits_per_parameter == pytest.approx(0.373047, abs=1e-4)


def test_nested_offset_is_the_exact_mean_of_the_scales():
    w = torch.randn(128, 100, generator=torch.Generator().manual_seed(4))
    _, plain = fourbit.quantize_4bit(w, blocksize=32)
    _, nested = fourbit.quantize_4bit(w, blocksize=32, double_quant=True)
    shuffled = plain.absmax.tolist()
    random.Random(0).shuffle(shuffled)
    assert float(nested.nested_offset) == scales.exact_mean(torch.tensor(shuffled))


# ---- formats, and scales that are given -----------------------------------------------------------


def test_every_format_decodes_by_one_function():
    values = torch.rand(700, generator=torch.Generator().manual_seed(5)) + 0.5
    assert FLOAT32.table is None and torch.equal(decode(*FLOAT32.encode(values)), values)
    absmax, *nested = DOUBLE.encode(values)
    assert absmax.dtype == torch.uint8 and torch.equal(nested[1], DOUBLE.table(values.device))
    whole = decode(absmax, *nested)
    torch.testing.assert_close(whole, values, rtol=0.02, atol=0)
    assert torch.equal(decode(absmax[250:600], *nested, first=250), whole[250:600])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_absmax_given_as_scales(dtype, nested):
    """The state of plain quantization, bit for bit; with double quantization other codes, and none is worse."""
    w = torch.randn(64, 100, generator=torch.Generator().manual_seed(6)).to(dtype)
    packed, state = fourbit.quantize_4bit(w, blocksize=64, double_quant=nested)
    absmax = fourbit.quantize_4bit(w, blocksize=64)[1].absmax
    given_packed, given = fourbit.quantize_4bit(w, blocksize=64, double_quant=nested, scales=absmax.view(10, 10))
    for name, tensor in state._tensors().items():
        assert tensor is None or torch.equal(getattr(given, name), tensor), name
    if not nested:
        assert torch.equal(given_packed, packed)
    errors = [(fourbit.dequantize_4bit(p, state, torch.float32) - w.float()).norm() for p in (given_packed, packed)]
    assert errors[0] <= errors[1] * (1 + 1e-6)


@pytest.mark.parametrize("nested", [False, True])
def test_given_scales_of_a_weight_that_is_not_finite(nested):
    w = torch.ones(600, 64)
    w[7, 3] = torch.inf
    packed, state = fourbit.quantize_4bit(w, blocksize=64, double_quant=nested, scales=torch.full((600,), 2.0))
    bad = fourbit.dequantize_4bit(packed, state).isnan()
    assert bool(bad[7].all()) and int(bad.sum()) == 64


@pytest.mark.parametrize("nested", [False, True])
def test_given_scales_under_transforms(nested):
    """torch.compile sees whole ops, and nothing is recorded for a derivative."""

    def run(w, scales):
        packed, state = fourbit.quantize_4bit(w, blocksize=64, double_quant=nested, scales=scales)
        return packed, state.absmax

    w, scales = torch.randn(20, 64), torch.rand(20) + 1
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(w, scales)
    for actual, expected in zip(compiled, run(w, scales), strict=True):
        assert torch.equal(actual, expected)
    packed, absmax = run(w.requires_grad_(), scales.requires_grad_())
    assert not absmax.requires_grad and torch.equal(packed, compiled[0])
