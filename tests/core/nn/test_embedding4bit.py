"""Embedding4bit: look-ups, padding_idx, double quantization, saving."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional

import fourbit
from fourbit.nn import Embedding4bit


def make(rows=50, dim=33, *, padding_idx=None, **config):
    torch.manual_seed(0)
    embedding = nn.Embedding(rows, dim, padding_idx)
    return embedding, Embedding4bit.from_embedding(embedding, fourbit.QuantConfig(**config))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dim", [33, 64, 128])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_rows_of_the_dequantized_table(double_quant, dim, quant_type):
    _, module = make(50, dim, double_quant=double_quant, quant_type=quant_type)
    for ids in (torch.randint(0, 50, (2, 3, 4)), torch.tensor(7), torch.tensor([1, 1], dtype=torch.int32)):
        assert torch.equal(module(ids), module.dequantize()[ids.long()])
        assert torch.equal(functional.embedding(ids, module.weight), module(ids))
    assert module(torch.zeros(0, dtype=torch.long)).shape == (0, dim)


@pytest.mark.parametrize("padding_idx", [0, 49, -1, -50])
def test_padding_row_stays_zero(padding_idx):
    embedding, module = make(padding_idx=padding_idx, double_quant=True)
    assert module.padding_idx == embedding.padding_idx
    row = module(torch.tensor([module.padding_idx]))
    assert torch.equal(row, torch.zeros_like(row))
    assert f"padding_idx={embedding.padding_idx}" in repr(module)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="padding_idx 50"):
        Embedding4bit(50, 8, padding_idx=50)
    with pytest.raises(ValueError, match="max_norm"):
        Embedding4bit.from_embedding(nn.Embedding(4, 4, max_norm=1.0))
    _, module = make()
    for bad in (50, -1):
        with pytest.raises(IndexError, match=f"id {bad} "):
            module(torch.tensor([0, bad]))
    with pytest.raises(TypeError, match="ids must be int32 or int64"):
        module(torch.tensor([0.5]))


@pytest.mark.parametrize("double_quant", [False, True])
def test_saving_and_loading(double_quant, tmp_path):
    from safetensors.torch import load_model, save_model

    _, module = make(padding_idx=3, double_quant=double_quant)
    ids = torch.arange(50)
    other = Embedding4bit(50, 33, 3, double_quant=double_quant)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(ids), module(ids))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(ids), module(ids))
    save_model(module, str(tmp_path / "embedding.safetensors"))
    third = Embedding4bit(50, 33, 3, double_quant=double_quant)
    load_model(third, str(tmp_path / "embedding.safetensors"))
    assert torch.equal(third(ids), module(ids))
    packed, state = module.quant_state()
    read = fourbit.QuantState.from_state_dict(state.to_state_dict())
    assert torch.equal(fourbit.embedding_4bit(ids, packed, read), module(ids))


def test_casts_keep_the_bits_and_follow_the_dtype():
    _, module = make(double_quant=True)
    half = copy.deepcopy(module).half()
    assert half(torch.tensor([1])).dtype == torch.float16
    assert torch.equal(half.dequantize(torch.float32), module.dequantize())
