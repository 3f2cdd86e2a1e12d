"""A PackedModule for a layer that fourbit leaves alone: transformers' plans and loader take it as their own."""

from __future__ import annotations

import pytest
import torch

import fourbit
from fourbit.checkpoint import reader
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.nn import PackedModule
from fourbit.nn.packed import REPLACEMENTS, options
from tests.support import skip_or_fail

try:
    from transformers.models.falcon.modeling_falcon import FalconLinear

    from fourbit_transformers import load
    from tests.plugins.zoo.models import ZOO
except ImportError:
    skip_or_fail("transformers is not installed: pip install 'fourbit[test]'")


@pytest.fixture
def falcon_4bit():
    before = dict(REPLACEMENTS)

    class FalconLinear4bit(PackedModule):
        """Falcon's projections: a subclass of nn.Linear with a forward of its own."""

        replaces = FalconLinear

        def __init__(self, shape, **arguments):
            super().__init__()
            self.setup(tuple(shape), **arguments)

        @classmethod
        def like(cls, replaced, config, dtype, device):
            new = cls(replaced.weight.shape, **options(config, dtype, device))
            new.bias = replaced.bias
            return new

        def forward(self, x):
            y = x @ self.weight.T
            return y if self.bias is None else y + self.bias

    yield FalconLinear4bit
    REPLACEMENTS.clear()
    REPLACEMENTS.update(before)


@torch.no_grad()
def test_a_declared_layer_is_planned_and_loaded(falcon_4bit, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = ZOO["FalconForCausalLM"].build()
    model.save_pretrained(tmp_path / "src")
    stored, held = fourbit.plan(tmp_path / "src"), fourbit.plan(model)
    assert {t.module for t in stored.quantized} == {t.module for t in held.quantized}
    assert {t.rule for t in stored.quantized} == {"weight of FalconLinear"} and len(stored.quantized) == 4
    quantize_checkpoint(tmp_path / "src", tmp_path / "dst")

    read, read_header = [], reader.read_header
    monkeypatch.setattr(reader, "read_header", lambda file: read.append(file) or read_header(file))
    loaded = load(tmp_path / "dst")
    assert len(read) == len(set(read)) == 1, "each header once"
    made = [m for m in loaded.modules() if isinstance(m, PackedModule)]
    assert len(made) == 4 and {type(m) for m in made} == {falcon_4bit}
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(ids).logits, fourbit.quantize_model(model)(ids).logits)
