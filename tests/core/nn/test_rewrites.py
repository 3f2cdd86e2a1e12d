"""Rewriting a 4-bit weight rounds it again: what that costs, and that it is said, once."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import fourbit
from fourbit.nn import Linear4bit
from fourbit.nn.view import RequantizationWarning

CYCLES = {0.05: {1: 0.040, 2: 0.075, 5: 0.169}, 0.2: {1: 0.108, 2: 0.177, 5: 0.353}}
"""Of the documentation: an adapter's part of the weight's norm, and the error after so many merges and unmerges."""


def layer_and_update(part=0.05, size=512, double_quant=False):
    torch.manual_seed(0)
    plain = nn.Linear(size, size)
    nn.init.normal_(plain.weight, std=0.02)
    layer = Linear4bit.from_linear(plain, fourbit.QuantConfig(double_quant=double_quant))
    update = torch.randn(size, 16) @ torch.randn(16, size)
    return layer, update * (part * layer.dequantize().norm() / update.norm())


def merge(layer, update):
    layer.weight.data += update


def unmerge(layer, update):
    layer.weight.data -= update


@pytest.mark.parametrize("double_quant", (False, True))
@pytest.mark.parametrize("part", CYCLES)
@pytest.mark.filterwarnings("ignore::fourbit.nn.view.RequantizationWarning")
def test_the_loss_is_what_the_documentation_says(part, double_quant):
    layer, update = layer_and_update(part, double_quant=double_quant)
    start = layer.dequantize()
    for cycle in range(1, 6):
        merge(layer, update)
        unmerge(layer, update)
        if cycle in CYCLES[part]:
            loss = float((layer.dequantize() - start).norm() / start.norm())
            assert loss == pytest.approx(CYCLES[part][cycle], rel=0.05)


def test_warned_at_the_third_time_and_once():
    layer, update = layer_and_update(size=64)
    merge(layer, update)
    unmerge(layer, update)
    with pytest.warns(RequantizationWarning, match="rewritten 3 times.*dequantize_model") as caught:
        merge(layer, update)
        unmerge(layer, update)
        merge(layer, update)
    (warning,) = caught
    assert warning.filename == __file__  # whoever wrote, not fourbit or torch
    assert layer.rewrites == 5


def test_every_way_of_writing_counts_once():
    layer, update = layer_and_update(size=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RequantizationWarning)
        layer.weight.data = layer.weight + update
        layer.weight.copy_(update)
        layer.weight.add_(update)
        layer.weight[0] = 1.0
        layer.weight += update
    assert layer.rewrites == 5
    assert copy.deepcopy(layer).rewrites == 5


def test_a_weight_that_is_stored_or_loaded_is_a_new_one():
    layer, update = layer_and_update(size=64)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for renew in (
        lambda: layer.store(update),
        lambda: layer.load_packed(*Linear4bit.from_linear(nn.Linear(64, 64)).quant_state()),
        lambda: layer.load_state_dict(state),
    ):
        merge(layer, update)
        merge(layer, update)
        assert layer.rewrites == 2
        renew()
        assert layer.rewrites == 0


def test_reading_is_no_writing():
    layer, update = layer_and_update(size=64)
    for _ in range(4):
        nn.functional.linear(update, layer.weight)
        layer.weight.data.clone()
        layer.weight + update
    assert layer.rewrites == 0
