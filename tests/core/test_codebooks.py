"""The value tables: what they hold, that the derivations give them, and how a nearest entry is chosen."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from fourbit import codebooks
from fourbit.codebooks import FP4, NF4, Codebook, thresholds
from tests.support import skip_or_fail


def float32(value: float) -> float:
    return float(np.float32(value))


# ---- values and derivations ----------------------------------------------------------------------


def test_nf4_is_sorted_with_an_exact_zero_and_both_ends():
    assert len(NF4.values) == 16 and list(NF4.values) == sorted(set(NF4.values))
    assert (NF4.values[0], NF4.values[7], NF4.values[15]) == (-1.0, 0.0, 1.0)
    assert sum(v < 0 for v in NF4.values) == 7 and sum(v > 0 for v in NF4.values) == 8


def test_tables_hold_float32_values_exactly():
    """A table in Python floats and the same in float32 must be one thing, or two backends would differ."""
    for values in (NF4.values, FP4.values, codebooks.DYNAMIC_VALUES):
        assert [float32(v) for v in values] == list(values)


def test_qlora_derivation_gives_nf4_within_float32_rounding():
    derived = codebooks.derive_nf4_qlora()
    assert len(derived) == 16 and derived[7] == 0.0
    for value, published in zip(derived, NF4.values, strict=True):
        assert abs(value - published) < 2**-23  # the published table was computed in float32


def test_textbook_derivation_is_symmetric_without_an_exact_zero():
    derived = codebooks.derive_normal_midpoints()
    assert len(derived) == 16 and list(derived) == sorted(derived)
    assert (derived[0], derived[-1]) == (pytest.approx(-1), 1)
    assert 0.0 not in derived and min(abs(v) for v in derived) > 0.04
    for left, right in zip(derived, reversed(derived), strict=True):
        assert left == pytest.approx(-right, abs=1e-12)
    distance = max(abs(a - b) for a, b in zip(derived, NF4.values, strict=True))
    assert 0.05 < distance < 0.1  # what its docstring says: up to about 0.08


def test_fp4_values_and_derivation():
    want = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
    for code in range(8):
        assert FP4.values[code] == pytest.approx(want[code], rel=1e-6)
        assert FP4.values[code + 8] == -FP4.values[code]
    for value, derived in zip(FP4.values, codebooks.derive_fp4(), strict=True):
        assert float32(derived) == pytest.approx(value, rel=2**-22)


def test_dynamic_map():
    values = codebooks.derive_dynamic_map()
    assert values == codebooks.DYNAMIC_VALUES and len(set(values)) == 256
    assert all(a < b for a, b in pairwise(values))
    assert values[0] == pytest.approx(-0.99296875, abs=1e-7)
    assert values[127] == 0.0 and values[255] == 1.0 and -1.0 not in values
    # sign by sign the same magnitudes, apart from 0 and 1
    assert [-v for v in values[:127]] == sorted(values[128:255], reverse=True)


def test_dynamic_map_is_the_formula():
    """±10^(i-6) times the midpoints of linspace(0.1, 1, 2^i + 1), written independently in float64."""
    want = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        want += [*middles, *-middles]
    assert np.allclose(codebooks.DYNAMIC_VALUES, np.sort(want), rtol=3e-7, atol=0)


def test_tables_equal_those_of_bitsandbytes():
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        skip_or_fail("bitsandbytes is not installed: its tables are not compared")
    assert torch.equal(bnb.get_4bit_type("nf4", device="cpu"), NF4.tensor())
    assert torch.equal(bnb.get_4bit_type("fp4", device="cpu"), FP4.tensor())
    assert torch.equal(bnb.create_dynamic_map(), codebooks.dynamic_map())


# ---- choosing the nearest entry ------------------------------------------------------------------


def test_thresholds_are_the_float32_midpoints():
    edges, codes = thresholds(NF4.tensor())
    assert edges.dtype == torch.float32 and codes.tolist() == list(range(16))
    table = np.array(NF4.values, dtype=np.float32)
    assert np.array_equal(edges.numpy(), (table[:-1] + table[1:]) * np.float32(0.5))


def test_thresholds_of_fp4_use_positive_zero_alone():
    edges, codes = thresholds(FP4.tensor())
    assert codes.numel() == 15 and edges.numel() == 14  # +0 (code 0) and -0 (code 8) are one value
    assert 0 in codes and 8 not in codes
    values = FP4.tensor()[codes.long()]
    assert torch.equal(values, values.sort().values)


def test_thresholds_of_any_order_and_any_duplicates():
    rng = random.Random(0)
    for _ in range(50):
        values = [rng.choice([-1.0, -0.5, -0.25, 0.0, 0.125, 0.75, 1.0]) for _ in range(16)]
        edges, codes = thresholds(torch.tensor(values))
        distinct = sorted(set(values))
        assert [values[c] for c in codes.tolist()] == distinct
        assert codes.tolist() == [values.index(v) for v in distinct]  # the lowest code of each value
        assert edges.tolist() == [(a + b) / 2 for a, b in pairwise(distinct)]


# ---- Codebook and its registration ---------------------------------------------------------------

GOOD = (*(-1 + i / 8 for i in range(15)), 1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (GOOD[:15], "want 16 values, got 15"),
        ((*GOOD, 0.5), "want 16 values, got 17"),
        ((*GOOD[:15], float("nan")), "finite and within"),
        ((*GOOD[:15], float("inf")), "finite and within"),
        ((*GOOD[:15], 1.5), "finite and within"),
        (tuple(v / 2 for v in GOOD), "exactly 1"),
        ((1.0,) * 16, "two different values"),
    ],
)
def test_codebook_values_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        Codebook("mine", values)


@pytest.mark.parametrize("name", ["", "NF4", "4bit", "a-b", "a b", "a" * 33, "é", "a\n", None, 4])
def test_codebook_names_are_checked(name):
    with pytest.raises(ValueError, match="codebook name"):
        Codebook(name, GOOD)


def test_codebook_takes_any_sequence_of_numbers():
    assert Codebook("mine", list(np.array(GOOD, dtype=np.float32))).values == GOOD
    assert hash(Codebook("mine", list(GOOD))) == hash(Codebook("mine", GOOD))


def test_registering(monkeypatch):
    monkeypatch.setattr(codebooks, "_codebooks", dict(codebooks._codebooks))
    mine = Codebook("test_mine", GOOD)
    codebooks.register(mine)
    codebooks.register(Codebook("test_mine", GOOD))  # the same again does no harm
    assert codebooks.get("test_mine") == mine and "test_mine" in codebooks.known()
    with pytest.raises(ValueError, match="'test_mine' is registered already"):
        codebooks.register(Codebook("test_mine", tuple(-v for v in GOOD)))
    with pytest.raises(ValueError, match="'nf4' is registered already"):
        codebooks.register(Codebook("nf4", GOOD))  # a checkpoint's "nf4" means one table everywhere


def test_unknown_type_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown quant_type 'NF4': known are .*fp4, nf4"):
        codebooks.get("NF4")
    with pytest.raises(TypeError, match="quant_type must be a string"):
        codebooks.get(4)


def test_table_is_cached_and_real_inside_a_fake_mode():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    fresh = Codebook("test_fresh", tuple(reversed(GOOD)))
    with FakeTensorMode():
        inside = fresh.tensor()
    assert not isinstance(inside, FakeTensor)
    assert fresh.tensor() is inside and not inside.is_inference()
    assert inside.tolist() == [float32(v) for v in fresh.values]
