"""Plans of folders and of the models in them agree, for many classes, and the folders load with bitsandbytes."""

from __future__ import annotations

import json
import logging
import socket
import warnings

import pytest
import torch
from torch import nn

import fourbit
from fourbit.checkpoint import Checkpoint
from fourbit.checkpoint.quantize import quantize_checkpoint
from tests.support import for_bitsandbytes, installed, skip_or_fail

try:
    import transformers

    from tests.plugins.zoo.entry import SMALL
    from tests.plugins.zoo.models import ZOO
except ImportError:
    skip_or_fail("transformers is not installed: pip install 'fourbit[test]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
QKV = ("q_proj", "k_proj", "v_proj")
FUSED_EXPERTS = ("MixtralForCausalLM", "Qwen3MoeForCausalLM", "GraniteMoeForCausalLM", "HunYuanMoEV1ForCausalLM")
"""Their experts are 3-D in memory, which transformers with bitsandbytes cannot load in 4 bit."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each model and its folder, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = ZOO[name].build(), tmp_path_factory.mktemp(name.split()[0]) / "plain"
            made[name][0].save_pretrained(made[name][1])
        return made[name]

    transformers.logging.disable_progress_bar()
    return get


def load(kind, folder):
    """As transformers does with bitsandbytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind.from_pretrained(folder, config=for_bitsandbytes(folder))


def bitsandbytes():
    if not (installed("bitsandbytes") and installed("accelerate")):
        skip_or_fail("bitsandbytes and accelerate are not installed: folders are not loaded with them")
    import bitsandbytes

    return bitsandbytes


def check_loaded(model, source, folder, planned):
    """Every quantized layer is quantized, to the values that fourbit reads; all else is as in the source."""
    bnb = bitsandbytes()
    linears = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert linears == {t.module for t in planned.quantized}
    stored = {t.module: t.name for t in planned.quantized}
    with Checkpoint(folder) as checkpoint:
        for name in linears:
            weight = model.get_submodule(name).weight
            want = fourbit.dequantize_4bit(*checkpoint.read_4bit(stored[name]))
            assert torch.equal(bnb.functional.dequantize_4bit(weight.data, weight.quant_state), want), name
    for name, tensor in source.state_dict().items():
        if name.rpartition(".")[0] not in linears:
            assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", FUSED_EXPERTS)
def test_fused_experts_load_where_they_stay(name, folders, tmp_path):
    """README says so; in 4 bit transformers cannot load them, which is its limit and not a claim of ours."""
    model, folder = folders(name)
    bitsandbytes()
    config = fourbit.QuantConfig(blocksize=64, skip_modules=("experts", "block_sparse_moe"))
    report = quantize_checkpoint(folder, tmp_path / "small", config)
    assert report.plan.quantized
    check_loaded(load(type(model), tmp_path / "small"), model, tmp_path / "small", report.plan)


TIED_HEADS = ("BertForMaskedLM", "RobertaForMaskedLM", "WhisperForConditionalGeneration", "T5ForConditionalGeneration")


@pytest.mark.parametrize("name", TIED_HEADS)
@torch.no_grad()
def test_a_tied_head_of_another_name_runs(name, folders, tmp_path):
    model, folder = folders(name)
    bitsandbytes()
    quantize_checkpoint(folder, tmp_path / "small", fourbit.QuantConfig(blocksize=64))
    loaded = load(type(model), tmp_path / "small")
    head = loaded.get_output_embeddings()
    assert type(head) is nn.Linear and head.weight is loaded.get_input_embeddings().weight
    found, want = (ZOO[name].run(m).float() for m in (loaded, model))
    assert (found - want).norm() < 0.5 * want.norm()


def test_what_the_model_keeps_in_float32_stays(folders):
    planned = fourbit.plan(folders("T5ForConditionalGeneration")[1])
    wo = [t for t in planned.tensors if t.name.endswith(".wo.weight")]
    assert [(t.action, t.rule) for t in wo] == [("skip", "the model keeps it in float32: wo")] * 2
    assert {t.module for t in wo} <= set(planned.left_modules)


def test_a_float16_folder_keeps_them_so(tmp_path):
    """float16 is what transformers would raise to float32: loading must find them unquantized."""
    bitsandbytes()
    model = ZOO["T5ForConditionalGeneration"].build().half()
    model.save_pretrained(tmp_path / "plain")
    quantize_checkpoint(tmp_path / "plain", tmp_path / "small", fourbit.QuantConfig(blocksize=64))
    loaded = load(type(model), tmp_path / "small")
    for found, want in ((loaded.encoder, model.encoder), (loaded.decoder, model.decoder)):
        wo, source = (stack.block[0].layer[-1].DenseReluDense.wo for stack in (found, want))
        assert type(wo) is nn.Linear and torch.equal(wo.weight.float(), source.weight.float())


DIVIDED = {
    "Dinov2Model SwiGLU": ("weights_in", ("gate_proj", "up_proj")),
    "NomicBertModel": ("Wqkv", QKV),
    "GteModel": ("qkv_proj", QKV),
}
"""Models that hold several layers of what is one matrix in their folders."""


@pytest.mark.parametrize("name", DIVIDED)
def test_what_is_divided_while_loading_is_quantized_as_one(name, tmp_path):
    """Rows stay whole, and so do blocks: the layers are those that quantize_model makes."""
    fused, layers = DIVIDED[name]
    if ZOO[name].model_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no such model")
    model = ZOO[name].build()
    model.save_pretrained(tmp_path / "plain")
    stored, held = fourbit.plan(tmp_path / "plain"), fourbit.plan(model)
    (found,) = (t for t in stored.tensors if t.name.endswith(f"{fused}.weight"))
    if not len(found.modules) > 1:
        pytest.skip(f"transformers {transformers.__version__} has it as one layer, too")
    assert found.action == "quantize" and tuple(m.rpartition(".")[2] for m in found.modules) == layers
    assert {m for t in stored.quantized for m in t.modules} == {t.module for t in held.quantized}
    assert stored.left_modules == held.left_modules
    assert stored.quantized_parameters == held.quantized_parameters
    one = fourbit.QuantConfig(skip_modules=(found.modules[1],))
    (left,) = (t for t in fourbit.plan(tmp_path / "plain", one).tensors if t.name == found.name)
    assert (
        left.rule == f"divided among layers of which {found.modules[1]}.weight stays: skip_modules: {found.modules[1]}"
    )
    wide = fourbit.QuantConfig(blocksize=4096)
    (torn,) = (t for t in fourbit.plan(tmp_path / "plain", wide).tensors if t.name == found.name)
    assert (torn.action == "skip") == bool(model.get_submodule(found.modules[0]).weight.numel() % 4096)

    import fourbit_transformers

    quantize_checkpoint(tmp_path / "plain", tmp_path / "small", fourbit.QuantConfig(blocksize=64))
    loaded = fourbit_transformers.load(tmp_path / "small")
    want = fourbit.quantize_model(ZOO[name].build(), fourbit.QuantConfig(blocksize=64))
    state = loaded.state_dict()
    assert state.keys() == want.state_dict().keys()
    assert all(torch.equal(state[n], t) for n, t in want.state_dict().items())


ABSURD = {
    "far too many layers": ({"num_hidden_layers": 10**9}, "TooLargeError: its config.json asks for more than"),
    "negative sizes": ({"hidden_size": -4}, "transformers: "),
    "another model_type": ({"model_type": "bert"}, "transformers: "),
    "an unknown class": ({"architectures": ["MadeUpForCausalLM"]}, "names no class that a plugin knows"),
    "a name that is no model": ({"architectures": ["AutoModel"]}, "names no class that a plugin knows"),
    "no names": ({"architectures": 7}, "names no class that a plugin knows"),
}


@pytest.mark.parametrize("case", ABSURD)
def test_a_config_that_cannot_be_built_leaves_names(case, folders, tmp_path):
    model, folder = folders("LlamaForCausalLM")
    changes, reason = ABSURD[case]
    copied = copy_with(folder, tmp_path / "src", changes)
    planned = fourbit.plan(copied)
    assert planned.described_by.startswith("names (") and reason in planned.described_by
    assert {t.name for t in planned.quantized} == {t.name for t in fourbit.plan(folder).quantized}
    assert planned.described_by in planned.summary() and planned.to_dict()["described_by"] == planned.described_by


def copy_with(folder, target, changes):
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    (target / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return target


def test_a_folder_runs_no_code_and_fetches_nothing(folders, tmp_path, monkeypatch, caplog, capfd):
    """Keys that have from_pretrained import a file of the folder, or fetch a kernel from the Hub."""
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    changes = {"auto_map": code, "attn_implementation": "nobody/kernel", "_attn_implementation": "nobody/kernel"}
    src = copy_with(folders("LlamaForCausalLM")[1], tmp_path / "src", {**changes, "quantization_config": None})
    (src / "evil.py").write_text("raise SystemExit('code of the folder')")

    def refuse(*_, **__):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with caplog.at_level(logging.WARNING):
        planned = fourbit.plan(src)
    assert planned.described_by.startswith("LlamaForCausalLM of transformers")
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_what_is_asked_is_the_shape_of_the_model_alone():
    """At any depth: a part of a model may have a config of its own."""
    from fourbit_models.transformers import _cleaned

    part = {
        **{"auto_map": {"AutoModel": "evil.Model"}, "_attn_implementation_internal": "a/b", "quantization_config": {}},
        **{"experts_implementation": "a/b", "use_pretrained_backbone": True, "hidden_size": 4},
    }
    want = {"hidden_size": 4}
    assert _cleaned({**part, "text_config": part, "parts": [part]}) == {**want, "text_config": want, "parts": [want]}


def test_what_is_set_while_a_model_is_built_is_set_back(folders):
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, transformers.logging.get_verbosity(), torch.get_default_device()
    fourbit.plan(folders("LlamaForCausalLM")[1])
    assert (constants.HF_HUB_OFFLINE, transformers.logging.get_verbosity(), torch.get_default_device()) == before
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_tensors_that_the_model_lacks_are_judged_by_names(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    src = copy_with(folders("LlamaForCausalLM")[1], tmp_path / "src", {})
    extra = {"model.mtp.0.up_proj.weight": torch.randn(64, 64), "model.mtp.0.embed_tokens.weight": torch.randn(64, 64)}
    save_file({**load_file(src / "model.safetensors"), **extra}, src / "model.safetensors", metadata={"format": "pt"})
    by_name = {t.name: t for t in fourbit.plan(src).tensors}
    assert by_name["model.mtp.0.up_proj.weight"].action == "quantize"
    assert by_name["model.mtp.0.embed_tokens.weight"].rule == "embedding"


def test_a_linear_layer_called_embedding_is_one_where_the_class_is_known(tmp_path):
    """Flux' x_embedder."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import diffusers
    except ImportError:
        skip_or_fail("diffusers is not installed: its folders are not planned")
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 4}
    more = {"in_channels": 64, "joint_attention_dim": 64, "pooled_projection_dim": 64, "axes_dims_rope": (4, 4, 8)}
    model = diffusers.FluxTransformer2DModel(**sizes, **more)
    model.save_pretrained(tmp_path)
    stored, held = fourbit.plan(tmp_path), fourbit.plan(model)
    assert stored.described_by == f"FluxTransformer2DModel of diffusers {diffusers.__version__}"
    assert {(t.name, t.rule) for t in stored.tensors} == {(t.name, t.rule) for t in held.tensors}
    assert "x_embedder" in {t.module for t in stored.quantized} and stored.left_modules == held.left_modules


@pytest.mark.parametrize("tied", (False, True))
def test_adapters_are_never_quantized(tied):
    if not installed("peft"):
        skip_or_fail("peft is not installed: adapters are not tried")
    import peft

    sizes = {**SMALL, "tie_word_embeddings": tied}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    config = peft.LoraConfig(target_modules="all-linear", r=4, modules_to_save=["lm_head"])
    model = peft.get_peft_model(base, config)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    planned = fourbit.plan(model)
    assert {t.module.rsplit(".", 1)[-1] for t in planned.quantized} == {"base_layer"} and len(planned.quantized) == 7
    fourbit.quantize_model(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert {t.rule for t in planned.tensors if "lora_" in t.name} == {"adapter"}
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()
