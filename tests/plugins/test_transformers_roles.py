"""A model's own word on its tensors: the folder and quantize_model decide alike and come to the same bits."""

from __future__ import annotations

import pytest
import torch

import fourbit
from fourbit.checkpoint import Checkpoint
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.nn import Conv1D4bit, ExpertWeights4bit, PackedModule
from tests.support import skip_or_fail

try:
    import transformers

    from tests.plugins.transformers_models import MODELS, make
    from tests.plugins.transformers_routed import CONV1D, OTHERS, ROUTED
except ImportError:
    skip_or_fail("transformers is not installed: pip install 'fourbit[test]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
ALL = {**MODELS, **ROUTED, **OTHERS, **CONV1D}
ROUTER = "router of a mixture of experts"
CONFIG = fourbit.QuantConfig(blocksize=64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each model and its folder, made once."""
    made = {}

    def get(name):
        if name not in made:
            model, folder = make(ALL[name]), tmp_path_factory.mktemp(name.replace(" ", "-")) / "plain"
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    transformers.logging.disable_progress_bar()
    return get


def decisions(planned):
    """What becomes of each module's matrices. A stack of experts and the matrices that a folder has of it are alike."""
    alike = {"stacked expert weights": "quantize", "linear weight": "quantize"}
    found = {}
    for t in planned.tensors:
        if len(t.shape) > 1 and not t.rule.startswith("tied to "):  # the folder has but one of those
            found.setdefault(t.module, set()).add(alike.get(t.rule, t.rule))
    return found


@pytest.mark.parametrize("name", ALL)
def test_a_folder_and_memory_decide_alike_and_come_to_the_same_bits(name, folders, tmp_path):
    model, folder = folders(name)
    stored, held = fourbit.plan(folder, CONFIG), fourbit.plan(model, CONFIG)
    assert stored.described_by.startswith(f"{type(model).__name__} of transformers ")
    assert decisions(stored) == decisions(held) and stored.left_modules == held.left_modules
    assert stored.quantized_parameters == held.quantized_parameters
    if not stored.quantized:
        return
    quantize_checkpoint(folder, tmp_path / "small", CONFIG)
    made = fourbit.quantize_model(make(ALL[name]), CONFIG)
    layers = {n: m for n, m in made.named_modules() if isinstance(m, PackedModule)}
    compared = set()
    with Checkpoint(tmp_path / "small") as checkpoint:
        for t in stored.quantized:
            layer = layers.get(t.module)
            if layer is None:  # one of a stack: its parameter's name is not the folder's
                continue
            packed, state = checkpoint.read_4bit(t.name)
            own, own_state = layer.quant_state()
            assert torch.equal(packed.flatten(), own.flatten()) and torch.equal(state.absmax, own_state.absmax), t.name
            assert state.shape == own_state.shape and isinstance(layer, Conv1D4bit) == t.transposed
            compared.add(t.module)
    assert compared == {n for n, layer in layers.items() if not isinstance(layer, ExpertWeights4bit)}


def rules(planned):
    return {t.name: t.rule for t in planned.tensors if len(t.shape) == 2}


@pytest.mark.parametrize("name", ROUTED)
def test_routers_stay_and_nothing_else_does(name, folders):
    model, _ = folders(name)
    found = rules(fourbit.plan(model))
    routers = {tensor for tensor, rule in found.items() if rule == ROUTER}
    words = ("gate.weight", "router.weight", "router.classifier.weight", "router.layer.weight")
    assert routers == {tensor for tensor in found if tensor.endswith(words)} != set()
    assert all(model.get_parameter(tensor).shape[0] in (1, 4) for tensor in routers)  # experts; 1 for the shared one


def test_a_gate_that_is_no_router_is_quantized(folders):
    found = rules(fourbit.plan(folders("d-fine")[0]))
    gates = {rule for tensor, rule in found.items() if "gateway.gate" in tensor}
    assert gates == {"linear weight"}


@pytest.mark.parametrize("name", ("d-fine", "rt-detr-v2"))
def test_linear_layers_that_the_model_ties_stay(name, folders):
    """transformers saves one of them, and ties 16-bit weights while loading."""
    model, _ = folders(name)
    tied = {n for pair in model.all_tied_weights_keys.items() for n in pair if n.endswith("weight")}
    found = {t.name: t for t in fourbit.plan(model).tensors if t.name in tied}
    assert found and all(t.action == "skip" for t in found.values())
    assert any(t.rule.startswith("the model ties it to ") for t in found.values())


def test_conv1d_is_what_the_class_says(folders):
    """gpt_bigcode calls nn.Linear by the same names; decision_transformer has both."""
    kinds = {
        name: {t.module.rpartition(".")[2]: t.kind for t in fourbit.plan(folders(name)[1]).quantized}
        for name in ("gpt2", "gpt-bigcode", "decision-transformer")
    }
    names = ("c_attn", "c_proj", "c_fc")
    assert kinds["gpt2"] == dict.fromkeys(names, "transposed")
    assert kinds["gpt-bigcode"] == dict.fromkeys(names, "linear")
    assert (
        kinds["decision-transformer"].items()
        >= {**dict.fromkeys(names, "transposed"), "predict_state": "linear"}.items()
    )
