"""peft on transformers' models in 4 bit: k-bit preparation, counts, merging to 16 bit, saving and loading adapters."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import fourbit
from fourbit.nn import Linear4bit
from tests.support import need

need("transformers", "peft")

import peft  # noqa: E402
import transformers as T  # noqa: E402

from fourbit_transformers import FourbitConfig, examples  # noqa: E402

pytestmark = [
    # transformers', of names that it is going to change, and peft's
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
IDS = torch.arange(24).view(2, 12)


def plain(dtype=torch.float32, **more):
    torch.manual_seed(0)
    config = T.LlamaConfig(**SIZES, num_attention_heads=4, initializer_range=0.1, dtype=dtype, **more)
    return T.LlamaForCausalLM(config).to(dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    plain().save_pretrained(path)
    return path


def in_memory(folder, **config):
    return fourbit.quantize_model(T.AutoModelForCausalLM.from_pretrained(folder), fourbit.QuantConfig(**config))


def on_the_fly(folder, **config):
    return T.AutoModelForCausalLM.from_pretrained(folder, quantization_config=FourbitConfig(**config))


def from_4bit_folder(folder, **config):
    place = folder.parent / f"{folder.name}-4bit-{'-'.join(config)}"
    if not place.is_dir():
        on_the_fly(folder, **config).save_pretrained(place)
    return T.AutoModelForCausalLM.from_pretrained(place)


WAYS = pytest.mark.parametrize("load", (in_memory, on_the_fly, from_4bit_folder))


def lora(model, **more):
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", **more))


def trained(model, steps=4, lr=2e-2):
    """The model after some steps, and its losses."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


# ---- counts --------------------------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("double_quant", (False, True))
def test_parameters_are_those_of_the_16_bit_model(folder, load, double_quant):
    wanted, model = plain(), load(folder, double_quant=double_quant)
    assert model.num_parameters() == wanted.num_parameters()
    exclude = {"exclude_embeddings": True}
    assert model.num_parameters(**exclude) == wanted.num_parameters(**exclude)
    adapted = lora(model)
    assert adapted.get_nb_trainable_parameters() == lora(wanted).get_nb_trainable_parameters()
    assert adapted.num_parameters(only_trainable=True) == wanted.num_parameters(only_trainable=True)


@WAYS
def test_the_footprint_is_bytes(folder, load):
    model = load(folder)
    tensors = {t.untyped_storage().data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 14
    assert model.get_memory_footprint() == sum(tensors.values())
    assert model.get_memory_footprint() < plain().get_memory_footprint() * 0.45


def test_offloaded_by_accelerate(folder, tmp_path):
    """Its hooks make the parameters anew, at each call of a layer."""
    import accelerate

    model = accelerate.cpu_offload(on_the_fly(folder), execution_device="cpu")
    model(IDS)
    assert model.num_parameters() == plain().num_parameters()
    with pytest.raises(ValueError, match="is offloaded by accelerate"):
        fourbit.dequantize_model(model)


def test_what_is_printed(folder, capsys):
    adapted = lora(on_the_fly(folder))
    adapted.print_trainable_parameters()
    trainable, total = lora(plain()).get_nb_trainable_parameters()
    assert f"trainable params: {trainable:,} || all params: {total:,}" in capsys.readouterr().out


# ---- k-bit training -------------------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("reentrant", (True, False))
def test_kbit_training_turns_checkpointing_on(folder, load, reentrant):
    model = load(folder)
    same = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert same is model and model.is_gradient_checkpointing
    assert not any(p.requires_grad for p in model.parameters())
    without = trained(lora(load(folder)))
    torch.testing.assert_close(logits(trained(lora(model))), logits(without), rtol=1e-4, atol=1e-4)


@WAYS
def test_and_leaves_it_off_where_it_is_told_so(folder, load):
    assert not peft.prepare_model_for_kbit_training(load(folder), False).is_gradient_checkpointing


def test_a_model_in_16_bit_again_is_none_for_kbit_training(folder):
    for restored in (fourbit.dequantize_model(in_memory(folder)), on_the_fly(folder).dequantize()):
        assert not peft.prepare_model_for_kbit_training(restored).is_gradient_checkpointing


ALONE = """
import sys, peft, transformers
from fourbit_transformers import FourbitConfig
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=FourbitConfig())
peft.prepare_model_for_kbit_training(model)
assert model.is_gradient_checkpointing and model.num_parameters() and not hasattr(model, "is_loaded_in_4bit")
"""


def test_a_program_by_itself(folder):
    done = subprocess.run([sys.executable, "-c", ALONE, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# ---- merging to 16 bit ----------------------------------------------------------------------------------------


@WAYS
def test_merged_to_16_bit_nothing_of_the_adapter_is_lost(folder, load, tmp_path):
    adapted = trained(lora(load(folder)))
    want = logits(adapted)
    rounded = copy.deepcopy(adapted).merge_and_unload()
    merged = fourbit.dequantize_model(adapted).merge_and_unload()
    torch.testing.assert_close(logits(merged), want, rtol=1e-4, atol=1e-4)
    assert (logits(rounded) - want).norm() > 100 * (logits(merged) - want).norm()
    assert type(merged) is T.LlamaForCausalLM and not hasattr(merged, "hf_quantizer") and not merged.is_quantized
    merged.save_pretrained(tmp_path)
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {type(m) for m in again.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    torch.testing.assert_close(logits(again), logits(merged))


@WAYS
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_dequantized_by_transformers(folder, load, dtype, tmp_path):
    model = load(folder)
    weight = model.model.layers[0].mlp.up_proj.dequantize(dtype)
    model.dequantize(dtype)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weight)
    model.to(dtype).save_pretrained(tmp_path)
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype and not getattr(again.config, "quantization_config", None)
    assert torch.equal(again.model.layers[0].mlp.up_proj.weight, weight)


def test_repeated_merges_are_warned_of(folder):
    adapted = trained(lora(in_memory(folder)))
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    with pytest.warns(fourbit.nn.RequantizationWarning, match="dequantize_model"):
        adapted.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error", fourbit.nn.RequantizationWarning)
        once = trained(lora(in_memory(folder)))
        once.merge_and_unload()
        wide = fourbit.dequantize_model(trained(lora(in_memory(folder))))
        for _ in range(3):
            wide.merge_adapter()
            wide.unmerge_adapter()


# ---- before and after ------------------------------------------------------------------------------------------


def test_quantized_before_or_after_adapters_are_attached(folder):
    before = lora(in_memory(folder))
    after = fourbit.quantize_model(lora(T.AutoModelForCausalLM.from_pretrained(folder)))
    states = before.state_dict(), after.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert before.get_nb_trainable_parameters() == after.get_nb_trainable_parameters()
    torch.testing.assert_close(logits(trained(before)), logits(trained(after)))


@WAYS
def test_modules_to_save(folder, load, tmp_path):
    adapted = trained(lora(load(folder), modules_to_save=["lm_head"]))
    head = adapted.base_model.model.lm_head
    assert type(head.modules_to_save["default"]) is nn.Linear
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path)
    torch.testing.assert_close(logits(again), logits(adapted))
    merged = fourbit.dequantize_model(adapted).merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(again), rtol=1e-4, atol=1e-4)


def test_a_4_bit_module_cannot_be_one_of_the_modules_to_save(folder):
    """It would be a copy to be trained, and has nothing to train."""
    with pytest.raises(RuntimeError, match="4-bit|gradient"):
        peft.get_peft_model(
            in_memory(folder), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["down_proj"])
        )


@WAYS
def test_adapters_are_saved_and_loaded(folder, load, tmp_path):
    adapted = trained(lora(load(folder)))
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path)
    assert torch.equal(logits(again), logits(adapted))
    further = peft.PeftModel.from_pretrained(load(folder), tmp_path, is_trainable=True)
    trained(further, lr=2e-3)
    loaded = load(folder)
    loaded.load_adapter(str(tmp_path))  # transformers' own way to it
    assert torch.equal(logits(loaded), logits(adapted))


def test_auto_peft_model(folder, tmp_path):
    adapted = trained(lora(on_the_fly(folder)))
    adapted.save_pretrained(tmp_path)
    config = FourbitConfig()
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert isinstance(again.base_model.model.model.layers[0].mlp.up_proj.base_layer, Linear4bit)
    assert torch.equal(logits(again), logits(adapted))


def test_auto_peft_model_of_a_4_bit_folder(folder, tmp_path):
    adapted = trained(lora(from_4bit_folder(folder)))
    adapted.save_pretrained(tmp_path)
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again.base_model.model.model.layers[0].mlp.up_proj.base_layer, Linear4bit)
    assert torch.equal(logits(again), logits(adapted))


def test_the_recipe_of_the_readme(folder, tmp_path, monkeypatch):
    text = (Path(examples.__file__).parent / "README.md").read_text()
    (recipe,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    begin, end = recipe.split("...  ")
    monkeypatch.chdir(tmp_path)
    names = {"folder": str(folder)}
    exec(begin, names)
    model = names["model"]
    assert model.base_model.model.is_gradient_checkpointing
    want = logits(trained(model))
    exec(f"# {end}", names)
    again = T.AutoModelForCausalLM.from_pretrained("merged")
    torch.testing.assert_close(logits(again), want, rtol=1e-4, atol=1e-4)
