"""Parts of packed weights: their values are the same parts of the dequantized weight, bit for bit. Needs no vLLM."""

from __future__ import annotations

import pytest
import torch

import fourbit
from fourbit_vllm.gather import gathered
from fourbit_vllm.packed import PackedTensor, Source, cut, join

SHAPES = [(64, 128), (48, 96), (7, 33), (12, 80), (3, 24, 64)]


def packed_weight(shape, seed=0, **options):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    codes, state = fourbit.quantize_4bit(weight, **options)
    return PackedTensor(Source(codes, state)), fourbit.dequantize_4bit(codes, state)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_have_the_values_of_the_whole(shape, blocksize, double_quant):
    packed, whole = packed_weight(shape, blocksize=blocksize, double_quant=double_quant)
    rows, columns = shape[-2] // 2, shape[-1] // 2
    for part in (
        lambda w: w,
        lambda w: w.narrow(-2, rows, rows),
        lambda w: w.narrow(-1, columns, columns),
        lambda w: w.narrow(-2, 1, rows).narrow(-1, 0, columns),
        lambda w: w[..., :columns],
        lambda w: w.chunk(2, dim=-2)[1],
        lambda w: w.unsqueeze(0).unbind()[0],
        lambda w: w.detach(),
        lambda w: w.reshape(-1, shape[-1])[2:5],
        lambda w: w.view(*shape[:-1], 1, shape[-1]).select(-2, 0),
        lambda w: list(w.split([1, shape[-2] - 1], dim=-2))[1],
        lambda w: w[0],
    ):
        found, wanted = part(packed), part(whole)
        assert isinstance(found, PackedTensor) and found.shape == wanted.shape and found.dtype == wanted.dtype
        assert torch.equal(found.unpacked(), wanted)
        piece = cut(found)
        if piece is not None:
            assert torch.equal(piece.dequantize(found.dtype).view(wanted.shape), wanted)
            assert 32 <= piece.blocksize <= blocksize


def test_a_border_inside_a_block_makes_the_blocks_smaller():
    packed, _ = packed_weight((8, 256), blocksize=128)
    assert [cut(packed.narrow(1, start, 64)).blocksize for start in (0, 64, 32)] == [64, 64, 32]
    assert cut(packed.narrow(1, 0, 128)).blocksize == 128
    assert cut(packed.narrow(1, 16, 64)) is None
    assert cut(packed.narrow(0, 3, 2)).blocksize == 128


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.t(),
        lambda w: w * 2,
        lambda w: w.double(),
        lambda w: w.chunk(2, dim=1)[0] + 0,
        lambda w: w[:, ::2],
        lambda w: torch.cat([w, w]),
        lambda w: w.flip(0).contiguous(),
        lambda w: torch.zeros(64, 128).copy_(w),
        lambda w: w.reshape(128, 64),
    ],
)
def test_anything_else_sees_the_values(change):
    packed, whole = packed_weight((64, 128))
    found = change(packed)
    assert not isinstance(found, PackedTensor) and torch.equal(found, change(whole))


@pytest.mark.parametrize("double_quant", [False, True])
def test_parts_below_each_other(double_quant):
    one, first = packed_weight((6, 96), 0, blocksize=32, double_quant=double_quant)
    two, second = packed_weight((4, 96), 1, blocksize=64, double_quant=double_quant)
    joined = join([cut(one), cut(two), cut(one)])
    assert joined.blocksize == 32
    assert torch.equal(joined.dequantize(torch.float32), torch.cat([first, second, first]))


def test_what_cannot_be_below_each_other():
    odd, _ = packed_weight((3, 33))
    nf4, _ = packed_weight((4, 64))
    fp4, _ = packed_weight((4, 64), quant_type="fp4")
    assert join([cut(odd), cut(odd)]) is None
    assert join([cut(nf4), cut(fp4)]) is None
    assert join([cut(odd)]) is not None


def _stream(double_quant=False, storage=torch.uint8):
    weight = torch.randn(8, 64)
    codes, state = fourbit.quantize_4bit(weight, double_quant=double_quant)
    codes = codes.view(-1).view(storage).view(-1, 1)
    return {"a.weight": codes, **state.to_state_dict("a.weight.")}, fourbit.dequantize_4bit(*_read(codes, state))


def _read(codes, state):
    return codes.view(-1).view(torch.uint8), state


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_parts_of_a_weight_come_in_any_order(double_quant, storage, backwards):
    parts, whole = _stream(double_quant, storage)
    tensors = [("norm.weight", torch.ones(3)), *parts.items(), ("column.weight", torch.ones(4, 1))]
    found = dict(gathered(reversed(tensors) if backwards else tensors))
    assert found.keys() == {"norm.weight", "a.weight", "column.weight"}
    assert isinstance(found["a.weight"], PackedTensor) and torch.equal(found["a.weight"].unpacked(), whole)
    assert not isinstance(found["column.weight"], PackedTensor)
    again = dict(gathered(found.items()))
    assert again["a.weight"] is found["a.weight"]


@pytest.mark.parametrize("lost", ["absmax", "quant_map", "nested_absmax", "quant_state.bitsandbytes__nf4", ""])
def test_a_lost_part_is_named(lost):
    parts, _ = _stream(double_quant=True)
    del parts[f"a.weight.{lost}" if lost else "a.weight"]
    with pytest.raises(ValueError, match=r"^a\.weight"):
        list(gathered(parts.items()))


def test_parts_that_do_not_fit_are_named():
    parts, _ = _stream()
    parts["a.weight"] = parts["a.weight"][:-3]
    with pytest.raises(ValueError, match=r"a\.weight has 253 bytes"):
        list(gathered(parts.items()))
    parts, _ = _stream()
    parts["a.weight.absmax"] = parts["a.weight.absmax"][1:]
    with pytest.raises(ValueError, match=r"a\.weight\.absmax"):
        list(gathered(parts.items()))
