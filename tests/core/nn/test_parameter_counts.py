"""Who counts a model's parameters counts those of the model, and who measures its bytes measures bytes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fourbit
from fourbit.nn import Embedding4bit, ExpertWeights4bit, Linear4bit
from tests.core.nn.frozen_model import DOUBLE_QUANT, Adapted
from tests.core.nn.test_frozen_copies import COPIES


def count(model):
    return sum(p.numel() for p in model.parameters())


def true_bytes(model):
    return sum(t.untyped_storage().nbytes() for t in model.state_dict().values())


@DOUBLE_QUANT
@pytest.mark.parametrize(
    "plain",
    (nn.Linear(64, 48), nn.Linear(33, 5), nn.Linear(7, 3, bias=False), nn.Embedding(10, 32)),
    ids=("even", "odd", "flat", "embedding"),
)
def test_the_parameters_of_the_model(plain, double_quant):
    cls = Embedding4bit if isinstance(plain, nn.Embedding) else Linear4bit
    layer = cls.from_module(plain, fourbit.QuantConfig(double_quant=double_quant))
    assert count(layer) == count(plain)
    assert layer.scales.numel() == 0
    assert layer.qweight.numel() == plain.weight.numel()
    tensors = [*layer.parameters(), *layer.buffers()]
    assert sum(t.nelement() * t.element_size() for t in tensors) == sum(t.nbytes for t in tensors) == true_bytes(layer)
    assert layer.qweight.nelement() == layer.qweight.shape.numel() == (plain.weight.numel() + 1) // 2


def test_stacked_experts():
    layer = ExpertWeights4bit.from_parameter(torch.randn(4, 32, 64))
    assert count(layer) == layer.numel() == 4 * 32 * 64


def test_what_is_no_parameter_of_a_module_has_its_own_elements():
    layer = Linear4bit.from_linear(nn.Linear(64, 48))
    own = 64 * 48 // 2
    q = layer.qweight
    for other in (q.detach(), q.data, q.view(-1), q.clone(), q.half(), copy.deepcopy(q), layer.state_dict()["qweight"]):
        assert other.numel() == own
    assert pickle.loads(pickle.dumps(q)).numel() == own
    assert torch.numel(q) == own
    assert layer.packed_weight().packed.numel() == own


@DOUBLE_QUANT
@pytest.mark.parametrize("how", COPIES)
def test_whatever_becomes_of_the_module(how, double_quant):
    assert count(COPIES[how](Adapted(double_quant))) == 2 * (64 * 96 + 64)


def test_what_is_assigned():
    """As loaders put tensors into modules: by name, one at a time."""
    layer, other = (Linear4bit.from_linear(nn.Linear(64, 48)) for _ in range(2))
    layer.qweight = nn.Parameter(other.qweight.clone(), requires_grad=False)
    layer.scales = nn.Parameter(other.scales.clone(), requires_grad=False)
    assert count(layer) == 48 * 64 + 48


def test_a_graph_counts_alike():
    layer = Linear4bit.from_linear(nn.Linear(64, 48))

    @torch.compile(fullgraph=True, backend="eager")
    def scaled(x):
        return layer(x) * sum(p.numel() for p in layer.parameters())

    x = torch.randn(2, 64)
    torch.testing.assert_close(scaled(x), layer(x) * (48 * 64 + 48))


def test_sharders_that_go_by_numel_see_elements():
    """DeepSpeed marks a parameter before it asks for its numel(), by which it cuts the storage."""
    layer = Linear4bit.from_linear(nn.Linear(64, 48))
    layer.qweight.ds_status = layer.scales.ds_status = "available"
    assert layer.qweight.numel() == layer.qweight.nelement()
    assert layer.scales.numel() == layer.scales.nelement() == 48


def test_parameters_that_a_library_makes_anew():
    """accelerate's offloading makes `type(old)(value, requires_grad=False)` and puts it into `_parameters`."""
    layer = Linear4bit.from_linear(nn.Linear(64, 48))
    for device in ("meta", "cpu"):
        for name in ("qweight", "scales"):
            old = layer._parameters[name]
            layer._parameters[name] = type(old)(torch.empty_like(old, device=device), requires_grad=False).to(device)
        assert count(layer) == 48 * 64 + 48
