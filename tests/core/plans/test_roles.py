"""What a tensor is for, as the model says it: routers by what is beside them, ties by the model's own list."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fourbit
from fourbit.nn import Linear4bit
from tests.folders import folder_of

ROUTER = "router of a mixture of experts"


def linear(rows=8):
    return nn.Linear(64, rows, bias=False)


class ParallelExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 64, 64))


class TopKRouter(nn.Module):
    """A plain matrix, as most of transformers' are, and here a layer besides."""

    def __init__(self):
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(4, 64)), linear()


class TopKGating(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = linear()


class SwitchRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.classifier = linear()


class LinearRouter(nn.Linear):
    def __init__(self):
        super().__init__(64, 4, bias=False)


class GatedLinear(nn.Module):
    """A block that holds its experts' matrix itself."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts_up = linear(), nn.Parameter(torch.randn(4, 64, 64))


class CDMoE(nn.ModuleDict):
    """Its experts have no layer of their own, and its class says what it is."""


class ResidualGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = linear(64)


def one_by_one():
    return nn.ModuleList([nn.ModuleDict({"gate": linear(), "up": linear()})])


BLOCKS = {
    "a linear gate": (nn.ModuleDict({"gate": linear(), "experts": one_by_one()}), {"gate"}),
    "within the gate": (nn.ModuleDict({"gate": nn.ModuleDict({"wg": linear()}), "experts": one_by_one()}), {"gate.wg"}),
    "a shared expert's": (
        nn.ModuleDict({"shared_expert_gate": linear(1), "experts": one_by_one()}),
        {"shared_expert_gate"},
    ),
    "by its class": (nn.ModuleDict({"choice": TopKRouter(), "experts": one_by_one()}), {"choice", "choice.inner"}),
    "called a classifier": (nn.ModuleDict({"pick": SwitchRouter(), "experts": one_by_one()}), {"pick.classifier"}),
    "a subclass of Linear": (nn.ModuleDict({"router": LinearRouter(), "experts": one_by_one()}), {"router"}),
    "beside experts by class": (
        nn.ModuleDict({"choice": TopKGating(), "input_linear": ParallelExperts()}),
        {"choice.layer"},
    ),
    "beside a parameter": (GatedLinear(), {"gate"}),
    "in a block of that class": (CDMoE({"router_gate": linear(), "up": linear()}), {"router_gate"}),
    "of a gated product": (nn.ModuleDict({"gate": linear(), "up": linear()}), set()),
    "of a residual": (nn.ModuleDict({"gateway": ResidualGate(), "up": linear()}), set()),
    "beside another gate alone": (nn.ModuleDict({"gate": linear(), "shared_expert_gate": linear(1)}), set()),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_a_router_is_what_chooses_among_experts(case):
    block, routers = BLOCKS[case]
    planned = fourbit.plan(nn.ModuleDict({"mlp": block}))
    assert {t.module for t in planned.tensors if t.rule == ROUTER} == {f"mlp.{name}" for name in routers}
    assert all(t.action == "quantize" for t in planned.tensors if t.rule != ROUTER)
    assert any(t.action == "quantize" for t in planned.tensors)


NAMES = {
    "layers.0.mlp.gate": ROUTER,
    "layers.0.mlp.gate.wg": ROUTER,
    "layers.0.moe.router.layer": ROUTER,
    "layers.0.moe.router.classifier": ROUTER,
    "layers.0.mlp.router_gate": ROUTER,
    "layers.0.mlp.experts.3.gate": "linear weight",
    "layers.0.mlp.gate_proj": "linear weight",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_which_no_model_is_known_is_judged_by_names(name, tmp_path):
    """Nothing is beside it: to leave a gate costs little, to quantize a router much."""
    model = linear()
    for part in reversed(name.split(".")):
        model = nn.ModuleDict({part: model})
    assert [t.rule for t in fourbit.plan(folder_of(model, tmp_path / "f")).tensors] == [NAMES[name]]


def test_a_gate_with_more_rows_than_there_are_experts_is_none(tmp_path):
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"gate": linear(4097)})})
    assert [t.rule for t in fourbit.plan(folder_of(model, tmp_path / "f")).tensors] == ["linear weight"]


class Tying(nn.Module):
    """With the list that transformers' models keep; the tensors need not share a storage (yet)."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = linear(64), linear(64), linear(64)
        self.all_tied_weights_keys = {"second.weight": "first.weight"}


def test_what_the_model_ties_stays():
    """A reader ties 16-bit weights: transformers' save keeps the first of them alone."""
    model = nn.ModuleDict({"inner": Tying()})  # also where the whole is another's
    rules = {t.module: t.rule for t in fourbit.plan(model).tensors}
    assert rules == {
        "inner.first": "the model ties it to inner.second.weight",
        "inner.second": "the model ties it to inner.first.weight",
        "inner.third": "linear weight",
    }
    inner = model["inner"]
    inner.second.weight = inner.first.weight
    planned = fourbit.plan(model)
    assert {t.module for t in planned.quantized} == {"inner.third"}
    assert planned.left_modules == ("lm_head", "inner.first", "inner.second")
    fourbit.quantize_model(model)
    assert inner.second.weight is inner.first.weight and type(inner.third) is Linear4bit


def test_a_list_of_ties_that_is_none_is_no_matter():
    model = Tying()
    model.all_tied_weights_keys = ["second.weight"]
    assert len(fourbit.plan(model).quantized) == 3
