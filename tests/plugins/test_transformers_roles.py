"""A model's own word on its tensors: which gates are routers, which layers are tied, which are Conv1D.

That a folder and quantize_model decide alike, and come to the same bits, the zoo tries for every class.
"""

from __future__ import annotations

import pytest

import fourbit
from tests.support import skip_or_fail

try:
    import transformers

    from tests.plugins.zoo.models import ZOO
except ImportError:
    skip_or_fail("transformers is not installed: pip install 'fourbit[test]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
ROUTED = (
    *("JambaForCausalLM", "NemotronHForCausalLM", "Qwen3NextForCausalLM", "JetMoeForCausalLM", "PhimoeForCausalLM"),
    *("Llama4ForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "DbrxForCausalLM", "GptOssForCausalLM"),
    *("SwitchTransformersForConditionalGeneration", "NllbMoeForConditionalGeneration"),
)
"""Mixtures of experts, each with a router of another make."""

ROUTER = "router of a mixture of experts"
CONFIG = fourbit.QuantConfig(blocksize=64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each model and its folder, made once."""
    made = {}

    def get(name):
        if name not in made:
            model, folder = ZOO[name].build(), tmp_path_factory.mktemp(name.split()[0]) / "plain"
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    transformers.logging.disable_progress_bar()
    return get


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
    found = rules(fourbit.plan(folders("DFineForObjectDetection")[0]))
    gates = {rule for tensor, rule in found.items() if "gateway.gate" in tensor}
    assert gates == {"linear weight"}


@pytest.mark.parametrize("name", ("DFineForObjectDetection", "RTDetrV2ForObjectDetection"))
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
        for name in ("GPT2LMHeadModel", "GPTBigCodeForCausalLM", "DecisionTransformerModel")
    }
    names = ("c_attn", "c_proj", "c_fc")
    assert kinds["GPT2LMHeadModel"] == dict.fromkeys(names, "transposed")
    assert kinds["GPTBigCodeForCausalLM"] == dict.fromkeys(names, "linear")
    assert (
        kinds["DecisionTransformerModel"].items()
        >= {**dict.fromkeys(names, "transposed"), "predict_state": "linear"}.items()
    )
