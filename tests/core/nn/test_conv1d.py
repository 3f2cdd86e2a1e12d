"""Conv1D4bit: the transposed weight of transformers' Conv1D, in memory."""

from __future__ import annotations

import copy
import pickle
import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional

import fourbit
from fourbit.nn import Conv1D4bit, Linear4bit
from fourbit.nn.packed import replacement
from tests.core.conv1d import Conv1D, gpt2

CONFIG = fourbit.QuantConfig(blocksize=64)


def as_linear(conv):
    linear = nn.Linear(conv.nx, conv.nf)
    linear.weight, linear.bias = nn.Parameter(conv.weight.detach().T.contiguous()), conv.bias
    return linear


@pytest.mark.parametrize("double_quant", (False, True))
def test_it_is_the_linear_layer_of_the_transposed_weight(double_quant):
    conv, config = Conv1D(192, 64), fourbit.QuantConfig(blocksize=64, double_quant=double_quant)
    found, want = Conv1D4bit.from_module(conv, config), Linear4bit.from_linear(as_linear(conv), config)
    assert found.bias is conv.bias and found.weight.shape == (192, 64)
    assert torch.equal(found.qweight, want.qweight) and torch.equal(found.scales, want.scales)
    x = torch.randn(2, 3, 64)
    assert torch.equal(found(x), want(x)) and found(x).shape == conv(x).shape
    assert (found(x) - conv(x)).norm() < 0.2 * conv(x).norm()
    again = Conv1D4bit.from_state(*found.quant_state(), conv, "c_attn.weight")
    assert torch.equal(again(x), found(x))


def test_from_state_wants_what_files_have():
    packed, state = fourbit.quantize_4bit(torch.randn(64, 192))
    with pytest.raises(ValueError, match=r"h\.weight has shape \[64, 192\], the model wants \[192, 64\]"):
        Conv1D4bit.from_state(packed, state, Conv1D(192, 64), "h.weight")


def test_plan_and_quantize_model():
    model = gpt2()
    ids = torch.arange(8)

    def run():
        block, x = model["h"][0], model["wte"](ids)
        return model["action"](block["attn"]["c_proj"](block["attn"]["c_attn"](x)[..., :64]))

    before, planned = run(), fourbit.plan(model, CONFIG)
    assert {t.module: (t.shape, t.shape_in_4bit) for t in planned.quantized if t.transposed} == {
        "h.0.attn.c_attn": ((64, 192), (192, 64)),
        "h.0.attn.c_proj": ((64, 64), (64, 64)),
        "h.0.mlp.c_fc": ((64, 256), (256, 64)),
    }
    assert {t.rule for t in planned.quantized} == {"linear weight, transposed on the way", "linear weight"}
    assert planned.left_modules == ("lm_head", "wte")
    fourbit.quantize_model(model, CONFIG)
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert kinds == {t.module: Conv1D4bit if t.transposed else Linear4bit for t in planned.quantized}
    assert 0 < (run() - before).norm() < 0.3 * before.norm()
    tensors = [*model.parameters(), *(b for n, b in model.named_buffers() if "codebook" not in n)]
    assert planned.bytes_after == sum(t.nbytes for t in tensors)


def test_an_empty_one_is_filled():
    full = fourbit.quantize_model(gpt2(), CONFIG)
    with torch.device("meta"):
        empty = gpt2()
    fourbit.quantize_model(empty, CONFIG)
    empty.load_state_dict(full.state_dict(), assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(empty["h"][0]["mlp"]["c_fc"](x), full["h"][0]["mlp"]["c_fc"](x))


def test_copies_and_gradients():
    layer, x = Conv1D4bit.from_module(Conv1D(64, 64)), torch.randn(3, 64, requires_grad=True)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is Conv1D4bit and torch.equal(other(x), layer(x))
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, 64))
    assert layer.bias.grad is not None


def test_a_bad_value_is_named_where_it_is():
    conv = Conv1D(192, 64)
    conv.weight.data[3, 100] = torch.nan
    with pytest.raises(fourbit.NonFiniteError, match=r"c_attn\.weight .*\[3, 100\]"):
        Conv1D4bit.from_module(conv, name="c_attn.weight")


@pytest.fixture
def transformers_has_it(monkeypatch):
    library = ModuleType("transformers.pytorch_utils")
    library.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", library)


@pytest.mark.usefixtures("transformers_has_it")
def test_twins_share_one_weight_and_a_linear_layer_is_none():
    model = nn.ModuleDict({"a": Conv1D(64, 64), "b": Conv1D(64, 64), "c": nn.Linear(64, 64)})
    model["b"].weight = model["a"].weight
    fourbit.quantize_model(model)
    assert model["a"].qweight is model["b"].qweight and model["a"].bias is not model["b"].bias
    held = model["a"].dequantize()
    fourbit.dequantize_model(model)
    assert type(model["a"]) is type(model["b"]) is Conv1D and model["a"].weight is model["b"].weight
    assert torch.equal(model["a"].weight, held.T)
    model = nn.ModuleDict({"a": Conv1D(64, 64), "c": nn.Linear(64, 64)})
    model["c"].weight = model["a"].weight
    assert [t.action for t in fourbit.plan(model).tensors if "weight" in t.name] == ["skip", "skip"]
    x = torch.randn(2, 64)
    want = functional.linear(x, model["a"].weight, model["c"].bias)
    assert torch.equal(fourbit.quantize_model(model)["c"](x), want)


def test_loaders_find_it():
    conv = Conv1D(64, 64)
    assert replacement(conv, "weight") == (Conv1D4bit, conv) and replacement(conv, "bias") is None

    class Other(nn.Module):
        """Of the same name, and somebody else's."""

    Other.__qualname__ = "Conv1D"
    assert replacement(Other(), "weight") is None
