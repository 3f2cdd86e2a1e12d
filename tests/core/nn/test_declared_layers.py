"""A PackedModule that fourbit has never heard of: planned, swapped in, explained, warmed up, loaded."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from torch import nn

import fourbit
from fourbit.checkpoint import Checkpoint
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.nn import Conv1D4bit, Embedding4bit, ExpertWeights4bit, Linear4bit, PackedModule
from fourbit.nn.packed import REPLACEMENTS, options, replacement
from fourbit.nn.quantize import swap
from fourbit_gpu.warmup import warmup
from tests.folders import folder_of


class Scaled(nn.Module):
    """Somebody's layer: a product, times a vector."""

    def __init__(self, columns, rows):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns))
        self.scale = nn.Parameter(torch.rand(rows))

    def forward(self, x):
        return nn.functional.linear(x, self.weight) * self.scale


@pytest.fixture
def scaled_4bit():
    before = dict(REPLACEMENTS)

    class Scaled4bit(PackedModule):
        replaces = Scaled

        def __init__(self, shape, quant_type, blocksize, double_quant, dtype, device):
            super().__init__()
            self.setup(shape, quant_type, blocksize, double_quant, dtype, device)

        @classmethod
        def like(cls, replaced, config, dtype, device):
            new = cls(replaced.weight.shape, **options(config, dtype, device))
            new.scale = replaced.scale
            return new

        def forward(self, x):
            return nn.functional.linear(x, self.weight) * self.scale

    yield Scaled4bit
    REPLACEMENTS.clear()
    REPLACEMENTS.update(before)


def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"a": Scaled(64, 32), "b": nn.Sequential(Scaled(64, 32)), "proj": nn.Linear(64, 32)})


def test_nobody_declares_it_and_it_stays():
    rules = {t.name: (t.action, t.rule) for t in fourbit.plan(model()).tensors}
    assert rules["a.weight"] == ("skip", "Scaled is not a linear layer that fourbit knows")


@pytest.mark.parametrize("double_quant", (False, True))
def test_in_memory(scaled_4bit, double_quant):
    held = model()
    held["b"][0].weight = held["a"].weight
    config = fourbit.QuantConfig(double_quant=double_quant, blocksize=32)
    planned = fourbit.plan(held, config)
    assert {t.name: t.rule for t in planned.quantized} == {
        **{"a.weight": "weight of Scaled", "b.0.weight": "tied to a.weight", "proj.weight": "linear weight"}
    }
    x, scale = torch.randn(3, 64), held["a"].scale
    fourbit.quantize_model(held, config)
    a, b = held["a"], held["b"][0]
    assert type(a) is type(b) is scaled_4bit and a.scale is scale and a.qweight is b.qweight and a is not b
    torch.testing.assert_close(a(x), nn.functional.linear(x, a.dequantize()) * scale)

    rules = {t.name: t.rule for t in fourbit.plan(held).tensors}
    assert rules["a.qweight"] == rules["a.scales"] == "4-bit already" and "not a matrix" in rules["a.scale"]

    answer = fourbit.explain(a)
    assert (answer.op, answer.query.blocksize, answer.query.nested) == ("linear_4bit", 32, double_quant)
    assert warmup(held, rows=(1, 2)) == 4, "a and b are of one kind"


def test_the_model_itself_is_refused_by_name(scaled_4bit):
    with pytest.raises(ValueError, match=r"itself a Scaled: use Scaled4bit\.from_module"):
        fourbit.quantize_model(Scaled(64, 32))
    assert type(scaled_4bit.from_module(Scaled(64, 32))) is scaled_4bit


def test_through_a_folder(scaled_4bit, tmp_path):
    plain = model()
    source = folder_of(plain, tmp_path / "src")
    report = quantize_checkpoint(source, tmp_path / "dst")
    quantized = [t.name for t in report.plan.quantized]
    assert quantized == [t.name for t in fourbit.plan(plain).quantized] and len(quantized) == 3

    loaded, made = model(), {}
    with Checkpoint(tmp_path / "dst") as checkpoint:
        for name in checkpoint.quantized():
            owner, _, leaf = name.rpartition(".")
            cls, replaced = replacement(loaded.get_submodule(owner), leaf)
            made[name] = cls.from_state(*checkpoint.read_4bit(name), replaced, name)
    swap(loaded, made)
    want = fourbit.quantize_model(model())
    x = torch.randn(3, 64)
    for name in ("a", "b", "proj"):
        assert torch.equal(loaded[name](x), want[name](x))


def test_a_weight_of_another_shape_is_refused_with_its_name(scaled_4bit):
    packed, state = fourbit.quantize_4bit(torch.randn(32, 32))
    with pytest.raises(ValueError, match=r"a\.weight has shape \[32, 32\], the model wants \[32, 64\]"):
        scaled_4bit.from_state(packed, state, Scaled(64, 32), "a.weight")


def test_a_subclass_that_declares_nothing_takes_no_place():
    class Mine(Linear4bit):
        pass

    assert REPLACEMENTS[nn.Linear] is Linear4bit
    assert type(fourbit.quantize_model(nn.Sequential(nn.Linear(64, 64)))[0]) is Linear4bit
    assert type(Mine.from_linear(nn.Linear(64, 64))) is Mine


def test_what_was_put_is_taken_back_in_its_place():
    parent = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    before = list(parent)
    with ExitStack() as undo:
        Linear4bit.from_linear(parent[0]).put(parent, "0", undo)
        assert type(parent[0]) is Linear4bit
    assert list(parent) == before


LAYERS = {
    "linear": lambda **how: Linear4bit(64, 32, **how),
    "transposed": lambda **how: Conv1D4bit(64, 32, **how),
    "embedding": lambda **how: Embedding4bit(32, 64, **how),
    "experts": lambda **how: ExpertWeights4bit((4, 32, 64), **how),
    "experts whose blocks run across them": lambda **how: ExpertWeights4bit((4, 3, 32), **how),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("double_quant", (False, True))
def test_what_ours_say_of_themselves(kind, double_quant):
    layer = LAYERS[kind](blocksize=64, double_quant=double_quant, dtype=torch.bfloat16)
    query = layer.query()
    assert (query.device, query.dtype, query.blocksize) == (torch.device("cpu"), torch.bfloat16, 64)
    ops = {"linear": "linear_4bit", "transposed": "linear_4bit", "embedding": "embedding_4bit"}
    assert query.op == ops.get(kind, "grouped_linear_4bit") and query.nested == double_quant
    assert fourbit.explain(layer).query == query
    assert fourbit.explain(layer, dtype=torch.float32, blocksize=32).query == replace(
        query, dtype=torch.float32, blocksize=32
    )
    assert warmup(nn.ModuleList([layer, LAYERS[kind](blocksize=64, double_quant=double_quant)]), rows=(1, 3)) == 4
