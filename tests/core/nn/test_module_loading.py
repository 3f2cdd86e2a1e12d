"""load_state_dict of 4-bit modules: all of a module, or nothing of it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import fourbit
from fourbit.nn import Embedding4bit, ExpertWeights4bit, Linear4bit

ENTRIES = ("qweight", "scales", "codebook", "nested_scales", "nested_codebook", "nested_offset", "bias")


class Stubborn(torch.Tensor):
    """Another library's kind of tensor, which cannot be copied."""

    @staticmethod
    def __new__(cls, like):
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)

    def __init__(self, like):
        pass

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise RuntimeError(f"Stubborn has no {func}")


def nested(tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([tensor, tensor])


def quantized(tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8)


WRONG = {
    "meta": lambda v: v.to("meta"),
    "sparse": lambda v: v.to_sparse(),
    "dtype": lambda v: v.to(torch.int64),
    "shape": lambda v: torch.cat([v, v]),
    "nested": nested,
    "quantized": quantized,
    "numpy": lambda v: v.numpy(),
    "none": lambda v: None,
    "not to be copied": Stubborn,
}


def make(seed, *, bias=True, double_quant=True):
    torch.manual_seed(seed)
    return Linear4bit.from_linear(nn.Linear(96, 64, bias=bias), fourbit.QuantConfig(double_quant=double_quant))


def snapshot(module):
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: (tensor, tensor.detach().clone()) for name, tensor in tensors.items()}


def assert_untouched(module, before):
    for name, (tensor, value) in snapshot(module).items():
        assert tensor is before[name][0], f"{name} has been replaced"
        assert torch.equal(value, before[name][1]), f"{name} has been overwritten"


@pytest.mark.parametrize("strict", (True, False))
@pytest.mark.parametrize("assign", (True, False))
@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("entry", ENTRIES)
def test_one_wrong_tensor_and_nothing_is_taken(entry, kind, assign, strict):
    module, state = make(0), make(1).state_dict()
    if kind == "not to be copied" and assign:
        return  # assigning asks nothing of a tensor
    state[entry] = WRONG[kind](state[entry].detach().clone())
    before = snapshot(module)
    with pytest.raises(RuntimeError, match=rf"\b{entry}\b"):
        module.load_state_dict(state, strict=strict, assign=assign)
    assert_untouched(module, before)
    module.load_state_dict(make(1).state_dict(), strict=strict, assign=assign)
    x = torch.randn(2, 96)
    assert torch.equal(module(x), make(1)(x))


@pytest.mark.parametrize("assign", (True, False))
def test_an_error_comes_with_what_is_missing_and_unexpected(assign):
    module = make(0)
    before = snapshot(module)
    state = {**make(1).state_dict(), "stranger": torch.zeros(1), "scales": torch.zeros(1)}
    del state["bias"]
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*bias.*Unexpected.*stranger.*scales: want torch.uint8"):
        module.load_state_dict(state, assign=assign)
    assert_untouched(module, before)


@pytest.mark.parametrize("assign", (True, False))
def test_a_bias_alone_and_a_weight_alone(assign):
    module, bias = make(0), torch.ones(64)
    packed = module.qweight.clone()
    assert module.load_state_dict({"bias": bias}, strict=False, assign=assign).missing_keys
    assert torch.equal(module.bias, bias) and torch.equal(module.qweight, packed)
    state = make(1).state_dict()
    del state["bias"]
    assert module.load_state_dict(state, strict=False, assign=assign).missing_keys == ["bias"]
    assert torch.equal(module.bias, bias) and torch.equal(module.dequantize(), make(1).dequantize())


def test_a_module_beside_it_is_loaded():
    model = nn.Sequential(make(0), make(1))
    state = {**nn.Sequential(make(2), make(3)).state_dict(), "0.qweight": torch.zeros(1)}
    before = snapshot(model[0])
    with pytest.raises(RuntimeError, match=r"0\.qweight: want torch\.uint8"):
        model.load_state_dict(state)
    assert_untouched(model[0], before)
    assert torch.equal(model[1].dequantize(), make(3).dequantize())


def test_a_weight_is_assigned_whole_on_one_device():
    """All on the meta device is a way of freeing a weight; a part there would be none."""
    module = make(0)
    module.load_state_dict({k: v.to("meta") for k, v in make(1).state_dict().items()}, assign=True)
    assert module.qweight.is_meta and module.bias.is_meta
    module.load_state_dict(make(1).state_dict(), assign=True)
    assert torch.equal(module.dequantize(), make(1).dequantize())
    state = make(2).state_dict()
    before = snapshot(module)
    with pytest.raises(RuntimeError, match="on one device"):
        module.load_state_dict({**state, "scales": state["scales"].to("meta")}, assign=True)
    assert_untouched(module, before)


@pytest.mark.parametrize("assign", (True, False))
def test_the_other_modules(assign):
    torch.manual_seed(0)
    embedding = nn.Embedding(20, 32)
    for new in (
        lambda: Embedding4bit.from_embedding(embedding),
        lambda: ExpertWeights4bit.from_parameter(torch.ones(2, 4, 64)),
    ):
        module = new()
        state = {**new().state_dict(), "qweight": torch.zeros(0).to_sparse()}
        before = snapshot(module)
        with pytest.raises(RuntimeError, match="qweight"):
            module.load_state_dict(state, assign=assign)
        assert_untouched(module, before)


@pytest.mark.parametrize("assign", (True, False))
def test_values_of_a_bias_may_have_another_precision(assign):
    module, state = make(0), make(1).state_dict()
    state["bias"] = state["bias"].double()
    module.load_state_dict(state, assign=assign)
    assert module.bias.dtype == (torch.float64 if assign else torch.float32)
