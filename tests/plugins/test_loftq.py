"""LoftQ: the adapters begin with the best approximation to what the quantization loses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fourbit
from fourbit.nn import Linear4bit
from tests.support import need

need("transformers", "peft")

import peft  # noqa: E402

from fourbit_transformers.loftq import quantize_loftq  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
RANK = 8


def adapted(**more):
    torch.manual_seed(0)
    net = nn.ModuleDict({"up": nn.Linear(64, 96), "down": nn.Linear(96, 64), "other": nn.Linear(64, 64)})
    options = {"r": RANK, "lora_alpha": 12, "target_modules": ["up", "down"], **more}
    return peft.get_peft_model(net, peft.LoraConfig(**options))


def layers(model):
    return {name: model.base_model.model[name] for name in ("up", "down")}


def errors(model, originals):
    """Of each adapted layer, the norm of W - Q - s·B·A."""
    return {
        name: float(
            (originals[name] - layer.base_layer.dequantize() - layer.get_delta_weight("default").detach()).norm()
        )
        for name, layer in layers(model).items()
    }


@pytest.fixture
def model():
    return adapted()


@pytest.fixture
def originals(model):
    return {name: layer.base_layer.weight.detach().clone() for name, layer in layers(model).items()}


@pytest.mark.parametrize("double_quant", (False, True))
def test_it_is_the_best_of_its_rank(model, originals, double_quant):
    config = fourbit.QuantConfig(double_quant=double_quant)
    assert quantize_loftq(model, config) is model
    found = errors(model, originals)
    for name, layer in layers(model).items():
        lost = originals[name] - layer.base_layer.dequantize()
        singular = torch.linalg.svdvals(lost)
        assert found[name] == pytest.approx(float(singular[RANK:].norm()), rel=1e-4)
        assert found[name] < 0.9 * float(lost.norm())
        plain = Linear4bit.from_module(_linear(originals[name]), config)
        assert torch.equal(layer.base_layer.qweight, plain.qweight)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.requires_grad and b.requires_grad and a.abs().min() > 0


def _linear(weight):
    made = nn.Linear(*weight.shape[::-1], bias=False)
    made.weight = nn.Parameter(weight)
    return made


def test_more_iterations_lose_less(originals):
    losses = []
    for iterations in (1, 2, 5):
        model = quantize_loftq(adapted(), iterations=iterations)
        losses.append(sum(errors(model, originals).values()))
    assert losses[0] > losses[1] > losses[2]


def test_all_else_is_quantized_as_ever(model):
    plain = fourbit.quantize_model(copy.deepcopy(model))
    quantize_loftq(model)
    other, same = model.base_model.model["other"], plain.base_model.model["other"]
    assert isinstance(other, Linear4bit) and torch.equal(other.qweight, same.qweight)
    assert model.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()


def test_what_stays_in_16_bit_keeps_its_adapter(model):
    before = layers(model)["down"].lora_A["default"].weight.clone()
    quantize_loftq(model, fourbit.QuantConfig(skip_modules=["down"]))
    assert type(layers(model)["down"].base_layer) is nn.Linear
    assert torch.equal(layers(model)["down"].lora_A["default"].weight, before)
    assert (
        not layers(model)["down"].lora_B["default"].weight.any() and layers(model)["up"].lora_B["default"].weight.any()
    )


def test_half_precision():
    model = adapted().bfloat16()
    originals = {name: layer.base_layer.weight.detach().float() for name, layer in layers(model).items()}
    quantize_loftq(model)
    for name, layer in layers(model).items():
        lost = originals[name] - layer.base_layer.dequantize(torch.float32)
        rest = lost - layer.get_delta_weight("default").detach().float()
        assert float(rest.norm()) == pytest.approx(float(torch.linalg.svdvals(lost)[RANK:].norm()), rel=1e-2)


def test_what_cannot_be():
    quantized = fourbit.quantize_model(adapted())
    with pytest.raises(ValueError, match="adapts no linear layer that is in 16 bit"):
        quantize_loftq(quantized)
    with pytest.raises(ValueError, match="'another' adapts no linear layer"):
        quantize_loftq(adapted(), adapter="another")
    with pytest.raises(ValueError, match="DoRA has the magnitudes"):
        quantize_loftq(adapted(use_dora=True))
    with pytest.raises(ValueError, match="iterations must be 1 or more"):
        quantize_loftq(adapted(), iterations=0)
    broken = adapted()
    with torch.no_grad():
        layers(broken)["up"].base_layer.weight[0, 0] = float("nan")
    with pytest.raises(fourbit.NonFiniteError, match="up"):
        quantize_loftq(broken)
    assert not layers(broken)["up"].lora_B["default"].weight.any()
