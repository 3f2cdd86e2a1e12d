"""A model with frozen 4-bit storage, and whether that is as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fourbit
from fourbit.nn import Linear4bit
from fourbit.nn.frozen import FrozenTensor
from fourbit.nn.storage import STORAGE

DOUBLE_QUANT = pytest.mark.parametrize("double_quant", (False, True), ids=("plain", "double"))


class Adapted(nn.Module):
    """A frozen layer with a trained one beside it, as QLoRA has them."""

    def __init__(self, double_quant=False, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.base = Linear4bit.from_linear(nn.Linear(96, 64), fourbit.QuantConfig(double_quant=double_quant))
        self.base.bias.requires_grad_(False)
        self.adapter = nn.Linear(96, 64)

    def forward(self, x):
        return self.base(x) + self.adapter(x)


def storage(model):
    return {name: getattr(model.base, name) for name in STORAGE if hasattr(model.base, name)}


def values(model):
    return {name: tensor.clone() for name, tensor in storage(model).items()}


def assert_same(model, before):
    for name, tensor in storage(model).items():
        assert torch.equal(tensor, before[name]), name


def assert_guarded(model):
    for name, tensor in storage(model).items():
        assert isinstance(tensor, FrozenTensor), f"{name} is a {type(tensor).__name__}"
        assert isinstance(tensor, nn.Parameter) == (name in ("qweight", "scales"))
    assert {"base.qweight", "base.scales", "adapter.weight"} <= {name for name, _ in model.named_parameters()}
