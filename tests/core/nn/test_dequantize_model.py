"""dequantize_model: what was 4-bit is 16-bit again, exact, everywhere, and all or nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fourbit
from fourbit.nn import Embedding4bit, ExpertWeights4bit, Linear4bit, PackedModule
from tests.core.nn.frozen_model import DOUBLE_QUANT


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 64, 32))

    def forward(self, x):
        return torch.stack([nn.functional.linear(x, self.gate_up_proj[e]) for e in range(3)]).sum(0)


class Net(nn.Module):
    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(32, 64, padding_idx=3)
        self.up = nn.Linear(64, 96)
        self.same = self.up
        self.down = nn.Linear(96, 64, bias=False)
        self.twin = nn.Linear(96, 64)
        self.twin.weight = self.down.weight
        self.small = nn.Linear(64, 32)
        self.experts = Experts()
        self.to(dtype)

    def forward(self, ids):
        x = self.tokens(ids)
        return self.experts(self.small(self.down(self.up(x)) + self.twin(self.same(x))))


def quantized(double_quant=False, dtype=torch.bfloat16):
    model = fourbit.quantize_model(Net(dtype), fourbit.QuantConfig(double_quant=double_quant))
    model.tokens = Embedding4bit.from_embedding(model.tokens, fourbit.QuantConfig(double_quant=double_quant))
    assert isinstance(model.experts.gate_up_proj, ExpertWeights4bit)
    return model


def packed(model):
    return [module for module in model.modules() if isinstance(module, PackedModule)]


@DOUBLE_QUANT
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_the_model_as_it_was_with_the_values_of_4_bits(dtype, double_quant):
    plain, model = Net(dtype), quantized(double_quant, dtype)
    want = {name: m.dequantize() for name, m in model.named_modules() if isinstance(m, PackedModule)}
    ids = torch.arange(8)[None]
    before = model(ids)
    assert fourbit.dequantize_model(model) is model
    assert not packed(model)
    assert {n: (type(m), m.training) for n, m in model.named_modules()} == {
        n: (type(m), m.training) for n, m in plain.named_modules()
    }
    assert {n: (p.shape, p.dtype) for n, p in model.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in plain.named_parameters()
    }
    state = model.state_dict()
    assert state.keys() == plain.state_dict().keys()
    for name, weight in want.items():
        entry = state[name if name.startswith("experts") else f"{name}.weight"]
        assert torch.equal(entry, weight) and not torch.equal(
            entry, plain.state_dict()[name + ("" if name.startswith("experts") else ".weight")]
        )
    error = (model(ids) - before).float().norm() / before.float().norm()
    assert error < 4 * torch.finfo(dtype).eps
    plain.load_state_dict(state)
    assert torch.equal(plain(ids), model(ids))


def test_what_was_shared_is_shared():
    model = fourbit.dequantize_model(quantized())
    assert model.same is model.up
    assert model.twin.weight is model.down.weight and model.twin.bias is not None
    assert model.tokens.padding_idx == 3


@DOUBLE_QUANT
def test_a_dtype(double_quant):
    model = quantized(double_quant)
    exact = model.up.dequantize(torch.float32)
    fourbit.dequantize_model(model, torch.float32)
    assert torch.equal(model.up.weight, exact) and model.up.bias.dtype == torch.float32
    assert not torch.equal(exact, exact.bfloat16().float())
    with pytest.raises(TypeError, match="dequantize_model: dtype must be"):
        fourbit.dequantize_model(quantized(), torch.float64)


def test_biases_and_what_requires_a_gradient():
    model = quantized()
    bias = model.up.bias
    model.small.bias.data = model.small.bias.data.float()  # as k-bit training has them
    model.small.bias.requires_grad_(False)
    fourbit.dequantize_model(model)
    assert model.up.bias is bias and bias.requires_grad
    assert model.small.bias.dtype == torch.bfloat16 and not model.small.bias.requires_grad
    assert not any(p.requires_grad for n, p in model.named_parameters() if not n.endswith("bias"))
    model.requires_grad_(True)
    model(torch.arange(4)).float().sum().backward()
    assert model.up.weight.grad is not None and model.experts.gate_up_proj.grad is not None


def test_modes_and_hooks_stay():
    model = quantized().eval()
    seen = []
    handle = model.up.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    model.down.register_forward_pre_hook(lambda module, args, kwargs: seen.append("before"), with_kwargs=True)
    fourbit.dequantize_model(model)
    assert not model.up.training
    model(torch.arange(4))
    assert seen == [nn.Linear, "before", nn.Linear]  # `same` is `up`
    handle.remove()
    model(torch.arange(4))
    assert len(seen) == 4


def test_quantized_again_it_is_the_same_without_rounding():
    model = quantized(dtype=torch.float32)
    before = {n: t.clone() for n, t in model.up.state_dict().items()}
    fourbit.quantize_model(fourbit.dequantize_model(model))
    after = model.up.state_dict()
    assert isinstance(model.up, Linear4bit) and before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_on_the_meta_device():
    with torch.device("meta"):
        model = fourbit.quantize_model(Net())
    fourbit.dequantize_model(model)
    assert not packed(model) and model.up.weight.is_meta and model.up.weight.shape == (96, 64)


def test_nothing_to_do():
    model = Net()
    before = dict(model.named_parameters())
    assert fourbit.dequantize_model(model) is model
    assert all(before[n] is p for n, p in model.named_parameters())


class Silent4bit(PackedModule):
    """One that does not say what it takes the place of."""

    def __init__(self):
        super().__init__()
        self.setup((32, 64), "nf4", None, False, torch.float32, None)


def test_all_or_nothing(monkeypatch):
    model = quantized()
    model.last = Silent4bit()
    modules = {name: id(m) for name, m in model.named_modules()}
    with pytest.raises(NotImplementedError, match="Silent4bit does not say which 16-bit module"):
        fourbit.dequantize_model(model)
    assert {name: id(m) for name, m in model.named_modules()} == modules
    del model.last

    def fails(self, *args):
        super(ExpertWeights4bit, self).leave(*args)
        raise KeyboardInterrupt

    state = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    monkeypatch.setattr(ExpertWeights4bit, "leave", fails)
    with pytest.raises(KeyboardInterrupt):
        fourbit.dequantize_model(model)
    assert {name: id(t) for name, t in model.state_dict(keep_vars=True).items()} == state


def test_a_4_bit_module_by_itself():
    layer = Linear4bit.from_linear(nn.Linear(64, 32))
    with pytest.raises(ValueError, match="the model is itself a Linear4bit"):
        fourbit.dequantize_model(layer)
    restored = layer.restored(nn.Parameter(layer.dequantize()))
    x = torch.randn(2, 64)
    torch.testing.assert_close(restored(x), layer(x))


def test_copies_are_not_touched():
    model = quantized()
    other = copy.deepcopy(model)
    fourbit.dequantize_model(model)
    assert len(packed(other)) == 6
