"""One set of rules for memory and folders: roles by name, ties, all or nothing, what the model keeps."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

import fourbit
from fourbit.nn import ExpertWeights4bit, Linear4bit
from tests.folders import folder_of


def nested(name, module):
    """A model in which `module` has the dotted `name`."""
    for part in reversed(name.split(".")):
        parent = nn.Module()
        parent.add_module(part, module)
        module = parent
    return module


ROLES = {
    "lm_head": "output head",
    "model.lm_heads.0": "output head",
    "classifier": "output head",
    "classifier.out_proj": "output head",
    "score": "output head",
    "output": "output head",
    "head.fc": "output head",
    "layers.0.mlp.experts.0.gate": "linear weight",
    "layers.0.mlp.gate_proj": "linear weight",
    "layers.0.mlp.up_gate.0": "linear weight",
    "layers.0.attention.output.dense": "linear weight",
    "layers.0.scores": "linear weight",
    "encoder.head.q": "linear weight",
}


@pytest.mark.parametrize("name", ROLES)
def test_heads_by_name_are_the_same_in_memory_and_folders(name, tmp_path):
    model = nested(name, nn.Linear(64, 8, bias=False))
    rules = [[(t.name, t.rule) for t in fourbit.plan(m).tensors] for m in (model, folder_of(model, tmp_path / "f"))]
    assert rules == [[(f"{name}.weight", ROLES[name])]] * 2


@pytest.mark.parametrize("name", ("embed_tokens", "decoder.embed_tokens.0", "wte", "shared", "token_embedding"))
def test_embeddings_are_the_same_in_memory_and_folders(name, tmp_path):
    model = nested(name, nn.Embedding(64, 8))
    for planned in (fourbit.plan(model), fourbit.plan(folder_of(model, tmp_path / "f"))):
        assert [t.rule for t in planned.tensors] == ["embedding"] and planned.left_modules == ("lm_head", name)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(64, 128)
        self.b = nn.Linear(64, 128, bias=False)
        self.c = nn.Linear(64, 128)
        self.b.weight = self.a.weight


@pytest.mark.parametrize("double_quant", (False, True))
def test_tied_layers_share_one_storage(double_quant):
    model = Tied()
    want = model.a.weight.detach().clone()
    config = fourbit.QuantConfig(double_quant=double_quant)
    planned = fourbit.plan(model, config)
    assert {t.name: (t.action, t.rule) for t in planned.tensors if t.name.startswith("b")} == {
        "b.weight": ("quantize", "tied to a.weight")
    }
    fourbit.quantize_model(model, config)
    a, b = model.a, model.b
    assert type(a) is type(b) is Linear4bit and a is not b
    assert a.qweight is b.qweight and a.scales is b.scales and a.qweight is not model.c.qweight
    assert a.bias is not None and b.bias is None
    x = torch.randn(3, 64)
    torch.testing.assert_close(a(x) - a.bias, b(x))
    assert (b.dequantize() - want).norm() < 0.2 * want.norm()
    tensors = [*model.parameters(), *(t for n, t in model.named_buffers() if "nested_code" not in n)]
    assert planned.bytes_after == sum(t.nbytes for t in tensors) - sum(
        t.nbytes for n, t in model.named_buffers() if n.endswith(".codebook")
    )
    again = fourbit.quantize_model(Tied(), config)
    for parameter in again.parameters():
        parameter.data.zero_()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.b(x), b(x)) and again.a.qweight is again.b.qweight
    model.to(torch.float64).to(torch.float32)
    assert torch.equal(model.b(x), again.b(x)) and model.a.qweight is model.b.qweight


def test_a_layer_tied_to_an_embedding_stays():
    model = nn.ModuleDict({"proj": nn.Linear(64, 128, bias=False), "emb": nn.Embedding(128, 64)})
    model["emb"].weight = model["proj"].weight
    planned = fourbit.plan(model)
    assert {t.name: (t.action, t.rule) for t in planned.tensors} == {
        "proj.weight": ("skip", "tied to emb.weight, which stays: embedding"),
        "emb.weight": ("skip", "tied to proj.weight"),
    }
    fourbit.quantize_model(model)
    assert model["emb"].weight is model["proj"].weight and type(model["proj"]) is nn.Linear


def test_a_layer_tied_to_one_that_the_user_skips_stays():
    planned = fourbit.plan(Tied(), fourbit.QuantConfig(skip_modules=("b",)))
    assert {t.module for t in planned.quantized} == {"c"}
    assert planned.tensors[0].rule == "tied to b.weight, which stays: skip_modules: b"


def test_ties_that_a_file_names_in_its_header(tmp_path):
    """safetensors' save_model writes one of the tied tensors, and of the other its name."""
    model = nn.ModuleDict({"proj": nn.Linear(64, 128, bias=False), "tok_embed": nn.Embedding(128, 64)})
    model["tok_embed"].weight = model["proj"].weight
    save_model(model, str(tmp_path / "model.safetensors"))
    planned = fourbit.plan(tmp_path)
    assert [(t.name, t.action) for t in planned.tensors] == [("proj.weight", "skip")]
    assert "embedding" in planned.tensors[0].rule and set(planned.left_modules) == {"lm_head", "proj", "tok_embed"}
    tied = Tied()
    (tmp_path / "b").mkdir()
    save_model(tied, str(tmp_path / "b" / "model.safetensors"))
    planned = fourbit.plan(tmp_path / "b")
    assert {t.name for t in planned.quantized} == {"a.weight", "c.weight"} and planned.left_modules == ("lm_head",)


def layers(model):
    return [(name, id(module), id(getattr(module, "weight", None))) for name, module in model.named_modules()]


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(2, 64, 64))


def three():
    return nn.ModuleDict({"a": nn.Linear(64, 64), "experts": Experts(), "b": nn.Linear(64, 64)})


@pytest.mark.parametrize("error", (ValueError, KeyboardInterrupt, torch.OutOfMemoryError))
def test_nothing_has_changed_when_a_layer_cannot_be_made(monkeypatch, error):
    model, made = three(), []
    make = Linear4bit.from_module

    def second_fails(linear, *rest):
        made.append(linear)
        if len(made) == 2:
            raise error("no")
        return make(linear, *rest)

    monkeypatch.setattr(Linear4bit, "from_module", second_fails)
    before = layers(model), list(dict(model.named_parameters()))
    with pytest.raises(error):
        fourbit.quantize_model(model)
    assert (layers(model), list(dict(model.named_parameters()))) == before and len(made) == 2


@pytest.mark.parametrize("error", (ValueError, KeyboardInterrupt))
def test_nothing_has_changed_when_a_swap_fails(monkeypatch, error):
    model = three()
    real = ExpertWeights4bit.put

    def fail(*arguments):
        real(*arguments)
        raise error("no")

    before = layers(model), list(dict(model.named_parameters()))
    monkeypatch.setattr(ExpertWeights4bit, "put", fail)
    with pytest.raises(error):
        fourbit.quantize_model(model)
    assert (layers(model), list(dict(model.named_parameters()))) == before
    monkeypatch.undo()
    fourbit.quantize_model(model)
    assert type(model["b"]) is Linear4bit and type(model["experts"].up_proj) is ExpertWeights4bit


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_elements_is_left(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 0))
    for planned in (fourbit.plan(model), fourbit.plan(folder_of(model, tmp_path / "f"))):
        assert {t.name: t.rule for t in planned.tensors if t.name in ("0.weight", "1.weight")} == {
            "0.weight": "linear weight",
            "1.weight": "no elements",
        }
    fourbit.quantize_model(model)
    assert [type(m) for m in model] == [Linear4bit, nn.Linear]


class Kept(nn.Module):
    _keep_in_fp32_modules = ("wo", "gate.weight")
    _keep_in_fp32_modules_strict = AttributeError()  # not a list: some models have none

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("wi", "wo", "my_gate")})


def test_what_the_model_keeps_in_float32_stays():
    model = nn.ModuleDict({"inner": Kept()})  # also where the whole is another's
    rules = {t.module: t.rule for t in fourbit.plan(model).tensors if t.name.endswith("weight")}
    assert rules == {
        "inner.block.wi": "linear weight",
        "inner.block.wo": "the model keeps it in float32: wo",
        "inner.block.my_gate": "the model keeps it in float32: gate.weight",
    }


def test_names_on_the_list_catch_no_quantized_module():
    """Readers take a name for the beginning and for the end of others' too."""
    model = nn.ModuleDict({"score": nn.Linear(64, 4), "score_proj": nn.Linear(64, 64), "x": nn.Linear(64, 64)})
    model["mixer"] = nn.ModuleDict({"proj": nn.Linear(64, 64), "dt_proj": nn.Linear(64, 64)})
    model["mixer"].A_log = nn.Parameter(torch.randn(8, 8))  # its own matrix, but no layer's weight
    model["proj"] = nn.Linear(64, 64)
    planned = fourbit.plan(model, fourbit.QuantConfig(skip_modules=("proj", "x")))
    assert {t.module for t in planned.quantized} == {"score_proj", "mixer.dt_proj"}
    assert planned.left_modules == ("lm_head", "score$", "x", "mixer.proj", "proj$")


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.to_words = nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64))

    def get_output_embeddings(self):
        return self.to_words


class Headless(nn.Linear):
    def get_output_embeddings(self):
        raise NotImplementedError


def test_the_head_is_the_one_that_the_model_names():
    model = nn.ModuleDict({"inner": Inner(), "other": Headless(64, 64)})  # also where the whole is another's
    rules = {t.module: t.rule for t in fourbit.plan(model).tensors if t.name.endswith("weight")}
    assert rules["inner.body"] == "linear weight" and rules["inner.to_words.0"] == "output head"
