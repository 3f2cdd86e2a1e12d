"""transformers' own door: from_pretrained, save_pretrained, and folders of bitsandbytes."""

import copy
import json
import threading

import pytest
import torch
from torch import nn

import fourbit
from fourbit.nn import ExpertWeights4bit, Linear4bit, PackedModule
from tests.support import for_bitsandbytes, installed, skip_or_fail

try:
    import transformers
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from fourbit.checkpoint.quantize import quantize_checkpoint
    from fourbit_transformers import FourbitConfig, load, take_over_bitsandbytes
except ImportError:
    skip_or_fail("transformers is not installed: pip install 'fourbit[test]'")

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
IDS = torch.arange(12, device=DEVICE)[None]


def llama(**more):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **more))


def moe():
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **EXPERTS))


def neox():
    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes))


MODELS = {"llama": llama, "tied llama": lambda: llama(tie_word_embeddings=True), "moe": moe, "gpt-neox": neox}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            model = MODELS[name]()
            for p in model.parameters():
                nn.init.normal_(p, std=0.05)
            made[name] = tmp_path_factory.mktemp("plain")
            model.bfloat16().save_pretrained(made[name])
        return made[name]

    return get


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def packed(model):
    return sorted(name for name, module in model.named_modules() if isinstance(module, PackedModule))


def from_pretrained(folder, **arguments):
    arguments = {"device_map": {"": DEVICE}, **arguments}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_on_the_fly_in_memory_from_a_folder_and_saved_are_equal(name, double_quant, folders, tmp_path):
    plain = folders(name)
    config = fourbit.QuantConfig(double_quant=double_quant, blocksize=32)
    loaded = from_pretrained(plain, quantization_config=FourbitConfig(double_quant=double_quant, blocksize=32))
    held = fourbit.quantize_model(from_pretrained(plain), config)
    quantize_checkpoint(plain, tmp_path / "cli", config)
    assert packed(loaded) == packed(held) and len(packed(loaded)) in (12, 14, 8)
    assert torch.equal(logits(loaded), logits(held))
    stored = [from_pretrained(tmp_path / "cli"), load(tmp_path / "cli", device=DEVICE)]
    if name != "moe" or not double_quant:  # a stack has one mean of its scales, single matrices have many
        assert all(torch.equal(logits(each), logits(loaded)) for each in stored)
    for each, folder in ((loaded, "loaded"), (held, "held"), (stored[0], "stored")):
        each.save_pretrained(tmp_path / folder)
        again = from_pretrained(tmp_path / folder)
        assert torch.equal(logits(again), logits(each)) and packed(again) == packed(each)
        if name == "moe" and double_quant:
            continue  # whose scales come apart in groups of their own, or else decoded
        again.save_pretrained(tmp_path / f"{folder} again")
        first, second = (load_file(tmp_path / f / "model.safetensors") for f in (folder, f"{folder} again"))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        assert first.keys() == load_file(tmp_path / "cli" / "model.safetensors").keys()


def test_bits_are_equal_after_saving(folders, tmp_path):
    model = from_pretrained(folders("llama"), quantization_config=FourbitConfig(double_quant=True))
    model.save_pretrained(tmp_path)
    ours, theirs = model.state_dict(), from_pretrained(tmp_path).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_in_shards_with_another_dtype_and_attention(folders, tmp_path):
    model = from_pretrained(
        folders("llama"), quantization_config=FourbitConfig(), dtype=torch.float32, attn_implementation="eager"
    )
    assert model.dtype is torch.float32 and model.config._attn_implementation == "eager"
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits(again), logits(model)) and again.dtype is torch.float32
    assert from_pretrained(tmp_path, dtype=torch.float16)(IDS).logits.dtype is torch.float16


def test_skip_modules_and_what_other_readers_must_leave(folders, tmp_path):
    model = from_pretrained(folders("llama"), quantization_config=FourbitConfig(skip_modules=["v_proj", "*.0.mlp.*"]))
    assert len(packed(model)) == 14 - 2 - 3
    model.save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {"lm_head", "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.up_proj"} <= set(
        entry["llm_int8_skip_modules"]
    )
    assert entry["fourbit"]["skip_modules"] == ["v_proj", "*.0.mlp.*"]
    again = from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model)) and packed(again) == packed(model)


def offloaded(folder, tmp_path, **arguments):
    here = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb")
    device = 0 if DEVICE.type == "cuda" else str(DEVICE)
    places = {**dict.fromkeys(here, device), "model.layers.1": "disk", "lm_head": "disk"}
    return from_pretrained(folder, device_map=places, offload_folder=tmp_path / "offload", **arguments)


@pytest.mark.parametrize("stored", [False, True])
def test_offloaded_to_disk_and_saved_from_there(stored, folders, tmp_path):
    if not installed("accelerate"):
        skip_or_fail("accelerate is not installed: nothing is offloaded")
    model = from_pretrained(folders("llama"), quantization_config=FourbitConfig())
    model.save_pretrained(tmp_path / "small")
    if stored:
        away = offloaded(tmp_path / "small", tmp_path)
    else:
        away = offloaded(folders("llama"), tmp_path, quantization_config=FourbitConfig())
    assert away.model.layers[1].mlp.up_proj.qweight.is_meta and torch.equal(logits(away), logits(model))
    away.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(from_pretrained(tmp_path / "again")), logits(model))
    assert torch.equal(logits(from_pretrained(tmp_path / "small", device_map="auto")), logits(model))


def test_experts_are_saved_one_by_one_under_the_hubs_names(folders, tmp_path):
    model = from_pretrained(folders("moe"), quantization_config=FourbitConfig())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert tensors[name].shape == (64 * 64 // 2, 1)
    state = fourbit.QuantState.from_state_dict(
        {key: t for key, t in tensors.items() if key.startswith(f"{name}.")}, prefix=f"{name}."
    )
    stack = model.model.layers[1].mlp.experts.gate_up_proj
    assert torch.equal(fourbit.dequantize_4bit(tensors[name].reshape(-1), state), stack.dequantize()[3, 64:].cpu())


@pytest.mark.parametrize("skip", [["model.layers.0.*"], ["*.experts.1.*"], ["*.experts.*.up_proj"]])
def test_folders_with_some_experts_in_16_bit(skip, folders, tmp_path):
    """A stack of which a part is packed stays in 16 bit, with the values that the folder has."""
    quantize_checkpoint(folders("moe"), tmp_path / "small", fourbit.QuantConfig(skip_modules=skip))
    model, plain = from_pretrained(tmp_path / "small"), from_pretrained(folders("moe"))
    experts = [name for name, module in model.named_modules() if isinstance(module, ExpertWeights4bit)]
    assert len(experts) == (2 if skip == ["model.layers.0.*"] else 2 if "up_proj" in skip[0] else 0)
    with fourbit.checkpoint.Checkpoint(tmp_path / "small") as checkpoint:
        for name in checkpoint.quantized():
            want = fourbit.dequantize_4bit(*checkpoint.read_4bit(name))
            if ".experts." in name:
                where, _, leaf = name.removesuffix(".weight").partition(".experts.")
                expert, leaf = leaf.split(".")
                stack = "down_proj" if leaf == "down_proj" else "gate_up_proj"
                found = model.get_submodule(f"{where}.experts").__getattr__(stack)
                found = (found.dequantize() if isinstance(found, PackedModule) else found)[int(expert)]
                found = found if leaf == "down_proj" else found[64:] if leaf == "up_proj" else found[:64]
            else:
                found = model.get_submodule(name.removesuffix(".weight")).dequantize()
            assert torch.equal(found.cpu(), want), name
    for name, tensor in plain.named_parameters():
        if "norm" in name or "layers.0" in name and skip == ["model.layers.0.*"]:
            assert torch.equal(model.get_parameter(name), tensor)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(from_pretrained(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("double_quant", [False, True])
def test_routers_that_others_packed(double_quant, folders, tmp_path):
    """transformers' routers are no linear layers, and bitsandbytes' tools have packed those of some folders."""
    quantize_checkpoint(folders("moe"), tmp_path / "small", fourbit.QuantConfig(blocksize=32))
    file, name = tmp_path / "small" / "model.safetensors", "model.layers.1.mlp.gate.weight"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    codes, state = fourbit.quantize_4bit(tensors[name], blocksize=32, double_quant=double_quant)
    whole = {**tensors, name: codes.reshape(-1, 1), **state.to_state_dict(f"{name}.")}
    save_file(whole, file, metadata={"format": "pt"})
    model = from_pretrained(tmp_path / "small")
    router = model.model.layers[1].mlp.gate.weight
    assert isinstance(router, nn.Parameter) and router.dtype is torch.bfloat16
    assert torch.equal(router.cpu(), fourbit.dequantize_4bit(codes, state))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(from_pretrained(tmp_path / "again")), logits(model))


THEIRS = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "fp4": {},
    "double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "bfloat16 storage": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    "float32 storage": {"bnb_4bit_quant_storage": torch.float32, "bnb_4bit_compute_dtype": torch.bfloat16},
}


@pytest.fixture
def taken_over():
    take_over_bitsandbytes()
    yield
    take_over_bitsandbytes(False)


def needs_bitsandbytes():
    if not (installed("bitsandbytes") and installed("accelerate")):
        skip_or_fail("bitsandbytes and accelerate are not installed: their folders are not read")


@pytest.mark.parametrize("kind", THEIRS)
def test_folders_of_bitsandbytes(kind, folders, tmp_path):
    needs_bitsandbytes()
    if kind == "float32 storage" and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 22):
        pytest.skip("older transformers casts codes that are stored as another dtype than the model's")
    import bitsandbytes

    config = BitsAndBytesConfig(load_in_4bit=True, **THEIRS[kind])
    theirs = AutoModelForCausalLM.from_pretrained(folders("llama"), quantization_config=config, device_map={"": DEVICE})
    theirs.save_pretrained(tmp_path / "theirs")
    assert isinstance(theirs.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)  # fourbit is imported
    take_over_bitsandbytes()
    try:
        ours = from_pretrained(tmp_path / "theirs")
        direct = from_pretrained(folders("llama"), quantization_config=config)
    finally:
        take_over_bitsandbytes(False)
    for name, module in theirs.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            mine = ours.get_submodule(name)
            want = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert isinstance(mine, Linear4bit) and torch.equal(mine.dequantize(), want), name
            assert mine.compute_dtype is (THEIRS[kind].get("bnb_4bit_compute_dtype") or torch.float32)
            if kind in ("nf4", "bfloat16 storage") or (DEVICE.type == "cpu" and kind != "double"):
                assert torch.equal(direct.get_submodule(name).dequantize(), want)
    assert torch.allclose(logits(ours), logits(theirs), atol=0.02)
    ours.save_pretrained(tmp_path / "ours")
    assert torch.equal(logits(from_pretrained(tmp_path / "ours")), logits(ours))
    unmarked = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert isinstance(unmarked.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    opened = load(tmp_path / "theirs").get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(opened, Linear4bit) and opened.compute_dtype is None


def test_bitsandbytes_reads_ours(folders, tmp_path):
    needs_bitsandbytes()
    import bitsandbytes

    model = from_pretrained(folders("llama"), quantization_config=FourbitConfig(blocksize=64))
    model.save_pretrained(tmp_path)
    theirs = from_pretrained(tmp_path, config=for_bitsandbytes(tmp_path))
    layers = [name for name, module in theirs.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert sorted(layers) == packed(model)
    assert torch.allclose(logits(theirs), logits(model), atol=0.02)


def test_8_bit_is_refused(folders, taken_over):
    config = FourbitConfig.from_bitsandbytes(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    assert (config.quant.quant_type, config.quant.blocksize) == ("nf4", 64)
    with pytest.raises(ValueError, match="no 8-bit"):
        FourbitConfig.from_bitsandbytes(BitsAndBytesConfig(load_in_8bit=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"quant_type": "nf5"}, ValueError, "nf5"),
        ({"blocksize": 33}, ValueError, "blocksize"),
        ({"skip_modules": "v_proj"}, TypeError, "skip_modules"),
        ({"load_in_8bit": True}, TypeError, "load_in_8bit"),
        ({"double_quant": 1}, TypeError, "double_quant"),
    ],
)
def test_a_wrong_configuration_names_the_field(arguments, error, message):
    with pytest.raises(error, match=message):
        FourbitConfig(**arguments)


def test_the_configuration_goes_to_files_and_back():
    config = FourbitConfig("fp4", 128, True, "bfloat16", ("a.*", "b"))
    again = FourbitConfig.from_dict(json.loads(config.to_json_string()))
    assert again.quant == config.quant and again.to_dict() == config.to_dict()
    assert copy.deepcopy(config).quant == config.quant


def test_broken_folders_are_refused(folders, tmp_path):
    from_pretrained(folders("llama"), quantization_config=FourbitConfig()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}  # off the file, which is overwritten
    name = "model.layers.0.mlp.up_proj.weight"
    others = {key: t for key, t in tensors.items() if not key.startswith(name)}
    whole = {key: t for key, t in tensors.items() if key.startswith(name)}
    for part in whole:
        save_file({**others, **{key: t for key, t in whole.items() if key != part}}, file, metadata={"format": "pt"})
        with pytest.raises((RuntimeError, ValueError), match="up_proj|during automatic conversion"):  # or in its log
            load(tmp_path)
    save_file({**tensors, f"{name}.absmax": whole[f"{name}.absmax"][:-1]}, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="during automatic conversion"):
        load(tmp_path)


def test_a_model_quantized_in_part_cannot_be_mistaken(folders, tmp_path):
    model = from_pretrained(folders("llama"))
    fourbit.quantize_model(model.model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a part alone had been quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_threads_at_once_leave_no_trace(folders, tmp_path):
    from_pretrained(folders("llama"), quantization_config=FourbitConfig()).save_pretrained(tmp_path)
    want, found = logits(load(tmp_path, device=DEVICE)), []
    threads = [threading.Thread(target=lambda: found.append(logits(load(tmp_path, device=DEVICE)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all(torch.equal(each, want) for each in found)
    assert nn.Linear(2, 2).weight.device.type == "cpu" and torch.get_default_dtype() is torch.float32


def test_pickled_copied_and_compiled(folders, tmp_path):
    model = from_pretrained(folders("llama"), quantization_config=FourbitConfig())
    twin = copy.deepcopy(model)
    twin.save_pretrained(tmp_path)
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(logits(compiled), logits(model))


def test_a_pipeline_generates(folders, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[UNK]", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    from_pretrained(folders("llama"), quantization_config=FourbitConfig()).save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)
    generate = transformers.pipeline("text-generation", model=str(tmp_path), device_map={"": DEVICE})
    assert any(isinstance(module, Linear4bit) for module in generate.model.modules())
    text = generate("a b c", max_new_tokens=3, do_sample=False, pad_token_id=0)[0]["generated_text"]
    assert text.startswith("a b c") and len(text) > len("a b c")
