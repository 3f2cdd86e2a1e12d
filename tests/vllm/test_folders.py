"""vLLM on one rank answers with the tokens of transformers, on folders of every kind."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

import fourbit
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.config import MARK, QuantConfig
from tests.support import need

need("transformers")

from tests.vllm import engine, models  # noqa: E402


def _unmarked(folder):
    """As bitsandbytes writes it: without fourbit's mark."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"][MARK]
    path.write_text(json.dumps(config))
    return folder


def _by_command(model, folder, **quant):
    plain = folder.with_name(folder.name + "-16")
    model.save_pretrained(plain)
    quantize_checkpoint(plain, folder, QuantConfig(**quant))
    return folder


def _twin(folder):
    """Where the same model is for transformers, if it reads this folder not or otherwise.

    It casts codes that lie in 16-bit elements to the model's dtype.
    """
    return folder.with_name(folder.name + "-twin")


def _by_bitsandbytes(folder, **options):
    need("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = folder.with_name(folder.name + "-16")
    models.llama().save_pretrained(plain)
    storage = options.pop("bnb_4bit_quant_storage", None)
    for path, more in ((folder, {"bnb_4bit_quant_storage": storage or "uint8"}), (_twin(folder), {})):
        config = BitsAndBytesConfig(load_in_4bit=True, **options, **more)
        AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, device_map="cpu").save_pretrained(path)
    assert MARK not in json.loads((folder / "config.json").read_text())["quantization_config"]
    return folder


def _stacked(folder):
    """A folder with all experts of a projection in one packed tensor."""
    twin = models.written(models.qwen3_moe(), _twin(folder))
    shutil.copytree(twin, folder)
    tensors = {name: t for name, t in load_file(twin / "model.safetensors").items() if ".experts." not in name}
    for i, layer in enumerate(models.qwen3_moe().model.layers):
        for name in ("gate_up_proj", "down_proj"):
            key = f"model.layers.{i}.mlp.experts.{name}"
            tensors[key], state = fourbit.quantize_4bit(getattr(layer.mlp.experts, name).detach())
            tensors |= {part: tensor.clone() for part, tensor in state.to_state_dict(f"{key}.").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


FOLDERS = {
    "nf4": lambda path: models.written(models.llama(), path),
    "fp4": lambda path: models.written(models.llama(), path, quant_type="fp4"),
    "double": lambda path: models.written(models.llama(), path, double_quant=True),
    "blocks of 256": lambda path: models.written(models.llama(), path, blocksize=256),
    "blocks across rows": lambda path: models.written(models.llama(**models.ODD), path, double_quant=True),
    "v and a layer in 16 bit": lambda path: models.written(
        models.llama(), path, skip_modules=("v_proj", "model.layers.1.mlp.*")
    ),
    "biases": lambda path: models.written(models.llama(attention_bias=True, mlp_bias=True), path),
    "tied head": lambda path: models.written(models.llama(tie_word_embeddings=True), path),
    "fused in the folder": lambda path: models.written(models.phi3(), path, double_quant=True),
    "unmarked": lambda path: _unmarked(models.written(models.llama(), path, double_quant=True)),
    "bitsandbytes": lambda path: _by_bitsandbytes(path, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "bitsandbytes, fp4, bf16 storage": lambda path: _by_bitsandbytes(
        path, bnb_4bit_quant_type="fp4", bnb_4bit_quant_storage="bfloat16"
    ),
    "fourbit quantize": lambda path: _by_command(models.llama(), path, double_quant=True),
    "qwen3-moe": lambda path: models.written(models.qwen3_moe(), path),
    "qwen3-moe, fourbit quantize": lambda path: _by_command(models.qwen3_moe(), path, double_quant=True),
    "qwen3-moe, experts in 16 bit": lambda path: models.written(models.qwen3_moe(), path, skip_modules=("*experts*",)),
    "qwen3-moe, stacked": _stacked,
    "mixtral": lambda path: models.written(models.mixtral(), path, double_quant=True),
    "mixtral, fp4": lambda path: models.written(models.mixtral(), path, quant_type="fp4", blocksize=32),
}

WHILE_LOADING = {
    "llama in 16 bit": (models.llama, {}),
    "llama in 16 bit, options": (models.llama, {"quant_type": "fp4", "blocksize": 32, "skip_modules": ["v_proj"]}),
    "qwen3-moe in 16 bit": (models.qwen3_moe, {}),
    "mixtral in 16 bit": (models.mixtral, {"blocksize": 128}),
}
QUICK = {
    *("double", "v and a layer in 16 bit", "bitsandbytes", "qwen3-moe", "mixtral"),
    "qwen3-moe in 16 bit",
}
"""Those that continuous integration has the time for."""


def some(*names):
    """Parameters of a test, `name`."""
    return models.some(names, QUICK)


@pytest.fixture(scope="module")
def served(tmp_path_factory, needs_vllm, asked_for):
    """Of each folder, what transformers answered and what vLLM did."""
    root = tmp_path_factory.mktemp("served")
    folders = {name: FOLDERS[name](root / str(i)) for i, name in enumerate(FOLDERS) if name in asked_for}
    wanted = {
        name: models.reference(_twin(folder) if _twin(folder).exists() else folder) for name, folder in folders.items()
    }
    found = engine.run(root, [{"folder": str(folder)} for folder in folders.values()])
    return {name: (wanted[name], answer) for name, answer in zip(folders, found, strict=True)}


@some(*FOLDERS)
def test_tokens_are_those_of_transformers(served, name):
    wanted, answer = served[name]
    assert answer["tokens"] == wanted, answer.get("error")
    assert len({token for each in wanted for token in each}) > 3  # a model that says one thing shows nothing


_WHOLE = "absmax code qweight"
_EXPERTS = "w13_absmax w13_code w13_qweight w2_absmax w2_code w2_qweight"
_IN_LLAMA = {
    f"model.layers.{i}.{name}": _WHOLE
    for i in range(2)
    for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
}


@some("nf4", "fp4", "double", "blocks of 256", "fused in the folder", "bitsandbytes", "fourbit quantize")
def test_fused_layers_are_one_packed_weight(served, name):
    assert served[name][1]["layers"] == [_IN_LLAMA]


@some("v and a layer in 16 bit")
def test_what_the_folder_has_in_16_bit_stays(served, name):
    (found,) = served[name][1]["layers"]
    assert found["model.layers.0.self_attn.qkv_proj"] == "absmax code dense_1 qweight"
    assert {name for name in _IN_LLAMA if name not in found} == {
        "model.layers.1.mlp.gate_up_proj",
        "model.layers.1.mlp.down_proj",
    }


@some("qwen3-moe", "mixtral")
def test_experts_are_packed(served, name):
    (found,) = served[name][1]["layers"]
    module = {"qwen3-moe": "mlp", "mixtral": "block_sparse_moe"}[name]
    experts = {layer: stored for layer, stored in found.items() if module in layer}
    assert set(experts.values()) == {_EXPERTS} and len(experts) == 2, found


@some("qwen3-moe, experts in 16 bit")
def test_experts_in_16_bit_stay(served, name):
    (found,) = served[name][1]["layers"]
    assert found and not any("experts" in layer for layer in found)


@pytest.fixture(scope="module")
def on_the_fly(tmp_path_factory, needs_vllm, asked_for):
    root = tmp_path_factory.mktemp("plain")
    jobs, wanted = [], []
    cases = {name: case for name, case in WHILE_LOADING.items() if name in asked_for}
    for i, (make, quant) in enumerate(cases.values()):
        make().save_pretrained(root / str(i))
        wanted.append(models.reference(models.written(make(), root / f"{i}-4", **quant)))
        overrides = {"quantization_config": {"quant_method": "fourbit", **quant}}
        options = {"hf_overrides": overrides} if quant else {"quantization": "fourbit"}
        jobs.append({"folder": str(root / str(i)), "options": options})
    found = engine.run(root, jobs)
    return {name: pair for name, *pair in zip(cases, wanted, found, strict=True)}


@some(*WHILE_LOADING)
def test_quantized_while_loading(on_the_fly, name):
    wanted, answer = on_the_fly[name]
    assert answer["tokens"] == wanted, answer.get("error")
    (found,) = answer["layers"]
    assert found.keys() >= {f"model.layers.{i}.self_attn.qkv_proj" for i in range(2)}
    assert not any(layer.endswith(("gate", "lm_head", "embed_tokens")) for layer in found)


@pytest.mark.parametrize("make", (pytest.param(models.llama, marks=pytest.mark.long), models.qwen3_moe))
def test_torch_compile(tmp_path, needs_vllm, make):
    """As vLLM compiles a model, which breaks at no op."""
    folder = models.written(make(), tmp_path / "model")
    (answer,) = engine.run(tmp_path, [{"folder": str(folder), "options": {"enforce_eager": False}}])
    assert answer["tokens"] == models.reference(folder), answer.get("error")


@pytest.mark.long
def test_broken_folders_are_refused(tmp_path, needs_vllm):
    """A weight without its scales, with a message that names it."""
    folder = models.written(models.llama(), tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    del tensors[f"{name}.absmax"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (answer,) = engine.run(tmp_path, [{"folder": str(folder)}])
    assert name in answer["error"]
