"""QuantState: its fields, and the round trip through packed bytes and a state dict."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fourbit
from fourbit import QuantState
from fourbit.codebooks import FP4, NF4
from fourbit.state import DTYPES

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
shapes = st.lists(st.integers(1, 40), min_size=1, max_size=4).filter(lambda s: torch.Size(s).numel() <= 20_000)
dtypes = st.sampled_from(list(DTYPES.values()))
blocksizes = st.sampled_from(BLOCKSIZES)
quant_types = st.sampled_from(["nf4", "fp4"])


def weight(shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors(state: QuantState) -> list[torch.Tensor | None]:
    return [state.absmax, state.code, state.nested_absmax, state.nested_code, state.nested_offset]


def assert_equal(a: QuantState, b: QuantState) -> None:
    fields = ("shape", "blocksize", "quant_type", "dtype", "double_quant")
    assert [getattr(a, f) for f in fields] == [getattr(b, f) for f in fields]
    for x, y in zip(tensors(a), tensors(b), strict=True):
        assert (x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y))


# ---- round trips ---------------------------------------------------------------------------------


@settings(max_examples=150)
@given(shapes, dtypes, blocksizes, quant_types, st.booleans(), st.integers(0, 2**32))
def test_quantize_and_dequantize_any_shape(shape, dtype, blocksize, quant_type, nested, seed):
    w = weight(shape, dtype, seed)
    packed, state = fourbit.quantize_4bit(w, quant_type=quant_type, blocksize=blocksize, double_quant=nested)
    n, blocks = w.numel(), -(-w.numel() // blocksize)
    assert packed.shape == ((n + 1) // 2, 1) and packed.dtype == torch.uint8
    assert state.absmax.numel() == blocks and state.numel == n and state.shape == w.shape
    out = fourbit.dequantize_4bit(packed, state)
    assert out.shape == w.shape and out.dtype == dtype
    # half of the widest gap between code values, times the scale, and 8-bit scales are up to 0.71 % off
    gap = (0.1520 if quant_type == "nf4" else 0.1667) * float(w.float().abs().max())
    assert (out.float() - w.float()).abs().max() <= gap * 1.02 + 0.02 * float(w.float().abs().max())
    assert state.nbytes == sum(t.nbytes for t in (packed, state.absmax)) + (
        state.nested_absmax.nbytes + state.nested_offset.nbytes if nested else 0
    )


@settings(max_examples=150)
@given(shapes, dtypes, blocksizes, quant_types, st.booleans(), st.sampled_from(["", "weight.", "a.b.c.weight."]))
def test_state_dict_round_trip(shape, dtype, blocksize, quant_type, nested, prefix):
    w = weight(shape, dtype)
    packed, state = fourbit.quantize_4bit(w, quant_type=quant_type, blocksize=blocksize, double_quant=nested)
    entries = state.to_state_dict(prefix)
    assert all(key.startswith(prefix) for key in entries) and all(t.is_contiguous() for t in entries.values())
    read = QuantState.from_state_dict(entries, prefix)
    assert_equal(read, state)
    assert torch.equal(fourbit.dequantize_4bit(packed, read), fourbit.dequantize_4bit(packed, state))


@given(st.binary(min_size=1, max_size=300), st.booleans())
def test_every_byte_means_its_two_codes(data, odd):
    """Unpacking of arbitrary bytes: element 2i is byte i's high nibble, 2i+1 its low one."""
    packed = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    count = 2 * len(data) - odd
    absmax = torch.ones(-(-count // 32))
    state = QuantState(absmax, torch.Size([count]), NF4.tensor(), 32, "nf4", torch.float32)
    codes = [code for byte in data for code in (byte >> 4, byte & 15)][:count]
    table = NF4.tensor().tolist()
    assert fourbit.dequantize_4bit(packed, state).tolist() == [table[c] for c in codes]


@given(st.lists(st.integers(0, 15), min_size=32, max_size=200))
def test_packing_of_arbitrary_codes(codes):
    """A weight made of code values, with ±1 in every block, packs to those codes."""
    for start in range(0, len(codes), 32):
        codes[start] = 15
    packed, _ = fourbit.quantize_4bit(torch.tensor([NF4.values[c] for c in codes]), blocksize=32)
    padded = [*codes, *[7] * (len(codes) % 2)]
    assert packed.flatten().tolist() == [a << 4 | b for a, b in zip(padded[::2], padded[1::2], strict=True)]


def test_the_layout_of_the_state_dict():
    _, state = fourbit.quantize_4bit(weight((8, 64), torch.bfloat16), blocksize=64, double_quant=True)
    entries = state.to_state_dict("m.weight.")
    meta_key = "m.weight.quant_state.bitsandbytes__nf4"
    assert {k: (v.dtype, tuple(v.shape)) for k, v in entries.items() if k != meta_key} == {
        "m.weight.absmax": (torch.uint8, (8,)),
        "m.weight.quant_map": (torch.float32, (16,)),
        "m.weight.nested_absmax": (torch.float32, (1,)),
        "m.weight.nested_quant_map": (torch.float32, (256,)),
    }
    meta = json.loads(bytes(entries[meta_key].tolist()))
    assert meta == {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": [8, 64],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": float(state.nested_offset),
    }


def test_other_entries_of_a_model_do_not_matter():
    _, state = fourbit.quantize_4bit(weight((8, 64)), blocksize=64)
    entries = {"a.weight": torch.zeros(1), "b.weight.absmax": torch.zeros(1), **state.to_state_dict("a.weight.")}
    assert_equal(QuantState.from_state_dict(entries, "a.weight."), state)


def test_a_device_is_followed():
    _, state = fourbit.quantize_4bit(weight((8, 64)), blocksize=64, double_quant=True)
    moved = QuantState.from_state_dict(state.to_state_dict(), device="meta")
    assert {t.device.type for t in tensors(moved) if t is not None} == {"meta"}
    assert state.to("meta").device.type == "meta" and state.device.type == "cpu"


@pytest.mark.parametrize("nested", [False, True])
def test_copies_and_pickles(nested):
    packed, state = fourbit.quantize_4bit(weight((8, 64)), blocksize=64, double_quant=nested)
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state)), copy.copy(state)):
        assert_equal(other, state)
        assert torch.equal(fourbit.dequantize_4bit(packed, other), fourbit.dequantize_4bit(packed, state))


def test_old_tables_that_differ_by_rounding_are_read():
    _, state = fourbit.quantize_4bit(weight((8, 64)), blocksize=64)
    entries = state.to_state_dict()
    entries["weight.quant_map"] = entries["weight.quant_map"] + 5e-8
    assert torch.equal(QuantState.from_state_dict(entries).code, NF4.tensor())


# ---- fields that do not fit ----------------------------------------------------------------------


def make(**changes) -> QuantState:
    _, state = fourbit.quantize_4bit(weight((8, 64)), blocksize=64, double_quant=True)
    return replace(state, **changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"absmax": torch.zeros(8)}, ValueError, "absmax must be uint8"),
        ({"absmax": torch.zeros(7, dtype=torch.uint8)}, ValueError, "with 8 scales"),
        ({"shape": (8, 65)}, ValueError, "with 9 scales"),
        ({"shape": (0, 64)}, ValueError, "no elements"),
        ({"code": torch.zeros(15)}, ValueError, "code must be"),
        ({"code": torch.zeros(16, dtype=torch.float64)}, ValueError, "code must be"),
        ({"blocksize": 48}, ValueError, "power of two"),
        ({"blocksize": 16}, ValueError, "from 32 to 4096"),
        ({"blocksize": True}, TypeError, "blocksize must be an int"),
        ({"blocksize": 64.0}, TypeError, "blocksize must be an int"),
        ({"dtype": torch.float64}, TypeError, "dtype must be"),
        ({"nested_absmax": None}, ValueError, "absmax must be float32"),
        ({"nested_absmax": torch.zeros(2)}, ValueError, "nested_absmax must be"),
        ({"nested_code": torch.zeros(255)}, ValueError, "nested_code must be"),
        ({"nested_code": None}, ValueError, "without nested_code"),
        ({"nested_offset": None}, ValueError, "nested_offset"),
        ({"nested_offset": torch.zeros(2)}, ValueError, "nested_offset must be"),
        ({"nested_code": torch.zeros(256, device="meta")}, ValueError, "nested_code is on meta"),
    ],
)
def test_fields_are_checked(changes, error, message):
    with pytest.raises(error, match=message):
        make(**changes)


def test_nested_parts_without_nested_scales():
    _, state = fourbit.quantize_4bit(weight((8, 64)), blocksize=64)
    with pytest.raises(ValueError, match="without nested_absmax"):
        replace(state, nested_offset=torch.zeros(()))


def test_fp4_and_nf4_states_differ_in_their_table():
    states = [fourbit.quantize_4bit(weight((8, 64)), quant_type=t)[1] for t in ("nf4", "fp4")]
    assert torch.equal(states[0].code, NF4.tensor()) and torch.equal(states[1].code, FP4.tensor())
