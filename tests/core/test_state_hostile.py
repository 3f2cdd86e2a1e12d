"""State dicts from strangers: whatever is in them, only KeyError or ValueError comes out, naming the key."""

from __future__ import annotations

import json
import random
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fourbit
from fourbit import QuantState
from fourbit.codebooks import FP4

PREFIX = "layer.weight."
META = PREFIX + "quant_state.bitsandbytes__nf4"


def good(nested: bool = True) -> dict[str, torch.Tensor]:
    w = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    return fourbit.quantize_4bit(w, blocksize=32, double_quant=nested)[1].to_state_dict(PREFIX)


def as_tensor(text: str | bytes) -> torch.Tensor:
    data = text.encode() if isinstance(text, str) else text
    return torch.tensor(list(data), dtype=torch.uint8)


def meta_of(entries: dict[str, torch.Tensor]) -> dict:
    return json.loads(bytes(entries[META].tolist()))


def with_meta(nested: bool = True, **changes) -> dict[str, torch.Tensor]:
    entries = good(nested)
    return {**entries, META: as_tensor(json.dumps(meta_of(entries) | changes))}


def read(entries) -> QuantState:
    return QuantState.from_state_dict(entries, PREFIX)


def test_the_good_ones_are_good():
    assert read(good()).double_quant and not read(good(nested=False)).double_quant
    assert read(with_meta()).blocksize == 32


# ---- entries -------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_every_missing_entry(nested):
    for key in good(nested):
        entries = good(nested)
        del entries[key]
        with pytest.raises(KeyError) as caught:
            read(entries)
        assert key.removesuffix("nf4") in str(caught.value)
    with pytest.raises(KeyError, match=PREFIX):
        read({})


@pytest.mark.parametrize("name", ["extra", "absmax.more", "nested_absmax", "nested_quant_map", "shape"])
def test_an_extra_entry(name):
    with pytest.raises(ValueError, match=f"{PREFIX}{name}"):
        read({**good(nested=False), PREFIX + name: torch.zeros(3)})


def test_two_states_for_one_weight():
    both = {**good(), PREFIX + "quant_state.bitsandbytes__fp4": good()[META]}
    with pytest.raises(KeyError, match="bitsandbytes__fp4.*bitsandbytes__nf4"):
        read(both)


@pytest.mark.parametrize("name", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(0),
        torch.zeros(1000),
        torch.zeros(40, dtype=torch.float64),
        torch.zeros(256, dtype=torch.float16),
        torch.zeros(40, dtype=torch.int8),
        torch.zeros(16, dtype=torch.int32),
        None,
        "text",
        [1.0] * 16,
    ],
    ids=lambda v: f"{v.dtype}{list(v.shape)}" if isinstance(v, torch.Tensor) else str(v)[:8],
)
def test_wrong_tensors(name, value):
    with pytest.raises(ValueError, match=PREFIX + name):
        read({**good(), PREFIX + name: value})


def test_another_table_under_the_name_nf4():
    """Readers take the type's name only, so a file whose table differs would be read wrongly elsewhere."""
    for table in (FP4.tensor(), torch.linspace(-1, 1, 16), torch.full((16,), torch.nan)):
        with pytest.raises(ValueError, match=f"{PREFIX}quant_map is not the table of quant_type 'nf4'"):
            read({**good(), PREFIX + "quant_map": table})


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_nested_table_that_is_not_finite(bad):
    table = good()[PREFIX + "nested_quant_map"].clone()
    table[17] = bad
    with pytest.raises(ValueError, match="nested_quant_map"):
        read({**good(), PREFIX + "nested_quant_map": table})


def test_a_nested_table_of_another_range_is_read_and_not_written():
    """Finite is enough to be read. Those of bitsandbytes lie within [-1, 1]; others are not passed off as its."""
    table = good()[PREFIX + "nested_quant_map"].clone()
    table[17] = -1e30
    state = read({**good(), PREFIX + "nested_quant_map": table})
    assert torch.equal(state.nested_code, table)
    with pytest.raises(ValueError, match=f"{PREFIX}nested_quant_map.*no format of bitsandbytes"):
        state.to_state_dict(PREFIX)


# ---- the JSON ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"7",
        b'"nf4"',
        b"\xff\xfe",
        b"{}",
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b"9" * 5000,
        b'{"shape": 1' + b"0" * 5000 + b"}",
        b'{"quant_type": "nf4", "quant_type": "fp4"}',
        b"x" * 70_000,
        b"\x00" * 100,
    ],
    ids=lambda d: f"{len(d)}-{d[:6]!r}",
)
def test_no_json_object(data):
    with pytest.raises(ValueError, match=META):
        read({**good(), META: as_tensor(data)})


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8), torch.tensor(123, dtype=torch.uint8), None, "{}"],
    ids=str,
)
def test_no_json_text(tensor):
    with pytest.raises(ValueError, match=META):
        read({**good(), META: tensor})


HUGE = 2**62
WRONG_FIELDS = [
    *[("blocksize", v) for v in (True, False, 64.0, "64", None, 0, -64, 31, 48, 16, 8192, HUGE, [64], {})],
    *[("dtype", v) for v in ("float64", "int8", "BFloat16", "torch.float32", "", None, 3, ["float32"])],
    *[("quant_type", v) for v in ("NF4", "fp4", "int4", "", None, 4, ["nf4"], "nf4 ", "../nf4", "x" * 60_000)],
    *[("shape", v) for v in (None, [], 64, "64", [0, 64], [-20, -64], [20.0, 64], [True, 64], [20, 64, 1] * 3)],
    *[("shape", v) for v in ([HUGE, HUGE], [HUGE], [2**31, 2**31], [[20, 64]], [None], ["20", 64])],
    *[("nested_blocksize", v) for v in (128, 0, None, "256", 512, [256])],
    *[("nested_dtype", v) for v in ("float16", None, 32)],
    *[("nested_offset", v) for v in (None, "0", True, [0.1], 1e39, -1e39, 10**400, {})],
    *[("nested_offset", v) for v in (3.45e38, -3.45e38, 345 * 10**36, 3.4028235677973366e38)],  # inf in float32
    ("unknown", 1),
]


@pytest.mark.parametrize(("field", "value"), WRONG_FIELDS, ids=lambda v: str(v)[:24])
def test_wrong_fields(field, value):
    with pytest.raises(ValueError, match="layer.weight.*" + ("nested" if field == "nested_dtype" else field[:7])):
        read(with_meta(**{field: value}))


@pytest.mark.parametrize("shape", [[2**40], [2**20, 2**40], [20, 65], [20, 62], [1]])
def test_a_shape_that_the_scales_do_not_fit(shape):
    with pytest.raises(ValueError, match=f"{PREFIX}absmax: want torch.uint8 with"):
        read(with_meta(shape=shape))


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_constants_that_are_no_numbers(literal):
    text = bytes(good()[META].tolist()).decode()
    offset = json.dumps(meta_of(good())["nested_offset"])
    with pytest.raises(ValueError, match=META):
        read({**good(), META: as_tensor(text.replace(offset, literal))})


@pytest.mark.parametrize("field", ["quant_type", "blocksize", "dtype", "shape", "nested_offset", "nested_dtype"])
def test_every_missing_field(field):
    meta = meta_of(good())
    del meta[field]
    with pytest.raises(ValueError, match=f"missing fields .*{field}"):
        read({**good(), META: as_tensor(json.dumps(meta))})


def test_nested_fields_without_nested_entries():
    entries = good(nested=False) | {META: good()[META]}
    with pytest.raises(KeyError, match="nested_absmax is missing"):
        read(entries)


def test_messages_stay_short():
    for field in ("dtype", "quant_type", "shape"):
        with pytest.raises(ValueError) as caught:
            read(with_meta(**{field: "x" * 50_000}))
        assert len(str(caught.value)) < 1000


def test_a_field_twice():
    """Readers differ in which of the two they take."""
    entries = good()
    text = bytes(entries[META].tolist()).rstrip()[:-1] + b', "nested_offset": 0}'
    with pytest.raises(ValueError, match="a name twice"):
        read({**entries, META: as_tensor(text)})


# ---- anything at all -----------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["nf4", "fp4", "float32", "bfloat16", 32, 64, 256, -1, 0, HUGE, 2**31, 1e308])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3)
)
FIELDS = ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset", "other"]


def read_or_refuse(entries) -> None:
    """Only KeyError and ValueError, and no memory in proportion to what the file claims."""
    tracemalloc.start()
    try:
        state = read(entries)
    except (KeyError, ValueError):
        pass
    else:
        # whatever is accepted must be usable: its sizes fit its tensors
        packed = torch.zeros((state.numel + 1) // 2, dtype=torch.uint8)
        assert fourbit.dequantize_4bit(packed, state).shape == state.shape
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20e6


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=4), st.booleans())
def test_mutated_fields(changes, nested):
    read_or_refuse(with_meta(nested, **changes))


@settings(max_examples=200)
@given(st.integers(0, 2**32), st.integers(1, 6), st.booleans())
def test_mutated_text(seed, count, nested):
    rng = random.Random(seed)
    entries = good(nested)
    data = entries[META].tolist()
    for _ in range(count):
        action, at = rng.randrange(3), rng.randrange(len(data))
        if action == 0:
            data[at] = rng.randrange(256)
        elif action == 1:
            del data[at]
        else:
            data.insert(at, rng.choice(b'0123456789-.eE[]{}":,'))
    read_or_refuse({**entries, META: as_tensor(bytes(data))})


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_arbitrary_text(data):
    read_or_refuse({**good(), META: as_tensor(data)})
