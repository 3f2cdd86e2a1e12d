"""explain: truthful about what would run and about what ran."""

import pytest
import torch
from torch import nn

import fourbit
from fourbit import dispatch, registry
from fourbit.backend import Backend, OpQuery, Support
from fourbit.nn import Embedding4bit, Linear4bit


class Picky(Backend):
    """Takes float32 linears alone."""

    api_version = 2
    name = "picky"
    device_types = ("cpu",)

    def __init__(self):
        self.calls = 0

    def supports(self, query):
        if query.op == "quantize_4bit" or query.dtype == torch.float32:
            return Support(True)
        return Support.no("float32 alone")

    def quantize_4bit(self, *args):
        return registry.get_backend("reference").quantize_4bit(*args)

    def dequantize_4bit(self, *args):
        self.calls += 1
        return registry.get_backend("reference").dequantize_4bit(*args)


USUAL = fourbit.explain("linear_4bit", dtype=torch.bfloat16).backend
"""The reference, where fourbit was installed without a compiler."""


@pytest.fixture
def picky():
    backend = Picky()
    registry.register(backend)
    yield backend
    registry.unregister("picky")


def test_a_layer_is_explained_with_the_reasons(picky):
    layer = Linear4bit.from_linear(nn.Linear(64, 64), fourbit.QuantConfig(double_quant=True))
    answer = fourbit.explain(layer)
    assert (answer.op, answer.backend, answer.query.nested) == ("linear_4bit", "picky", True)
    assert "composed: dequantize_4bit" in answer.path
    layer(torch.randn(1, 64))
    assert picky.calls == 1

    answer = fourbit.explain(layer, dtype=torch.bfloat16)
    assert answer.backend == USUAL
    assert answer.rejected == (("picky", "float32 alone"),)
    assert "not picky: float32 alone" in str(answer)
    layer(torch.randn(1, 64).bfloat16())
    assert picky.calls == 1


def test_what_ran_is_what_was_explained(picky):
    layer = Linear4bit.from_linear(nn.Linear(64, 64))
    dispatch.clear_tables()
    layer(torch.randn(1, 64))
    ran = {r.query.op: r.backend.name for r in dispatch.resolutions()}
    assert ran == {"linear_4bit": fourbit.explain(layer).backend}


def test_use_backend_is_named_as_the_reason(picky):
    with fourbit.use_backend("reference"):
        answer = fourbit.explain("linear_4bit")
    assert answer.backend == "reference"
    assert answer.rejected[0] == ("picky", "use_backend('reference') is in force")


def test_an_op_by_name_and_no_backend():
    answer = fourbit.explain("quantize_4bit", device="cuda:0", dtype=torch.float16, blocksize=128)
    assert answer.query == OpQuery("quantize_4bit", torch.device("cuda:0"), torch.float16, 128)
    assert answer.to_dict()["backend"] == "reference"


def test_where_no_backend_runs_an_op_it_says_so(picky):
    with fourbit.use_backend("picky"):
        answer = fourbit.explain("linear_4bit", dtype=torch.bfloat16)
    assert answer.backend is None
    assert "float32 alone" in answer.error and "NO BACKEND" in str(answer)


def test_other_layers_and_names_are_refused():
    assert fourbit.explain(Embedding4bit(8, 64)).op == "embedding_4bit"
    with pytest.raises(TypeError, match="runs in plain torch"):
        fourbit.explain(nn.Linear(2, 2))
    model = fourbit.quantize_model(nn.Sequential(nn.Linear(64, 64)))
    with pytest.raises(TypeError, match="it has 1 such layers inside"):
        fourbit.explain(model)
    with pytest.raises(ValueError, match="no op 'linear'"):
        fourbit.explain("linear")
