"""GPT-2's Conv1D through the libraries: bitsandbytes reads and writes the same folders, peft adapts the layers."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch

import fourbit
from fourbit.checkpoint.compare import compare_checkpoints
from fourbit.checkpoint.dequantize import dequantize_checkpoint
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.nn import Conv1D4bit
from tests.support import for_bitsandbytes, installed, skip_or_fail

try:
    import transformers
    from transformers.pytorch_utils import Conv1D

    from tests.plugins.zoo.models import ZOO
except ImportError:
    skip_or_fail("transformers is not installed: pip install 'fourbit[test]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
ALL = (
    *("GPT2LMHeadModel", "GPT2ForSequenceClassification", "OpenAIGPTLMHeadModel", "ImageGPTForCausalImageModeling"),
    *("DecisionTransformerModel", "ClvpForCausalLM", "VisionEncoderDecoderModel ViT, GPT-2"),
)
CONFIG = fourbit.QuantConfig(blocksize=64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each model in float32, and its folder, made once."""
    made = {}

    def get(name):
        if name not in made:
            model, folder = ZOO[name].build().float(), tmp_path_factory.mktemp(name.split()[0]) / "plain"
            model.config.pad_token_id = 0
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    transformers.logging.disable_progress_bar()
    return get


def bitsandbytes():
    if not (installed("bitsandbytes") and installed("accelerate")):
        skip_or_fail("bitsandbytes and accelerate are not installed: folders are not loaded with them")
    import bitsandbytes

    return bitsandbytes


def load(kind, folder, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind.from_pretrained(folder, **arguments).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # where a CPU has that, bitsandbytes computes in bfloat16
    return model


@torch.no_grad()
def outputs(model):
    """What the model makes of some input: all that is floating point and no cache."""
    torch.manual_seed(0)
    ids = torch.arange(8)[None]
    inputs = {"input_ids": ids}
    if "vision" in type(model).__name__.lower():
        inputs = {"pixel_values": torch.randn(1, 3, 16, 16), "decoder_input_ids": ids}
    elif type(model).__name__.startswith("Decision"):
        inputs = {"states": torch.randn(1, 4, 8), "actions": torch.randn(1, 4, 8), "rewards": torch.randn(1, 4, 1)}
        inputs |= {"returns_to_go": torch.randn(1, 4, 1), "timesteps": torch.arange(4)[None]}
    found = model(**inputs)
    kept = [v for v in found.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    assert kept
    return torch.cat([v.flatten() for v in kept])


@pytest.mark.parametrize("name", ALL)
def test_bitsandbytes_computes_the_same(name, folders, tmp_path):
    bnb = bitsandbytes()
    model, folder = folders(name)
    report = quantize_checkpoint(folder, tmp_path / "small", CONFIG)
    found = load(type(model), tmp_path / "small", config=for_bitsandbytes(tmp_path / "small"))
    theirs = {n for n, m in found.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert theirs == {t.module for t in report.plan.quantized} and any(t.transposed for t in report.plan.quantized)
    ours = fourbit.quantize_model(load(type(model), folder), CONFIG)
    torch.testing.assert_close(outputs(found), outputs(ours), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs(ours), outputs(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_transformers_with_fourbit_loads_and_saves(name, folders, tmp_path):
    """On the fly, from a folder of the command and from one that transformers saved: the same layers, bit for bit."""
    from fourbit_transformers import FourbitConfig

    model, folder = folders(name)
    quantize_checkpoint(folder, tmp_path / "small", CONFIG)
    want = fourbit.quantize_model(load(type(model), folder), CONFIG)
    want.save_pretrained(tmp_path / "saved")
    made = load(type(model), folder, quantization_config=FourbitConfig(blocksize=64))
    made.save_pretrained(tmp_path / "again")
    for found in (made, *(load(type(model), tmp_path / place) for place in ("small", "saved", "again"))):
        layers = {n: m for n, m in want.named_modules() if isinstance(m, Conv1D4bit)}
        assert {n for n, m in found.named_modules() if isinstance(m, Conv1D4bit)} == layers.keys() != set()
        for layer, its in ((layers[n], found.get_submodule(n)) for n in layers):
            assert torch.equal(layer.qweight, its.qweight) and torch.equal(layer.scales, its.scales)
        assert torch.equal(outputs(found), outputs(want))
    for place in ("saved", "again"):
        same = compare_checkpoints(tmp_path / "small", tmp_path / place)
        assert not same.errors and all(t.identical for t in same.tensors)


@pytest.mark.parametrize("name", ALL)
def test_dequantized_the_folder_is_plain_transformers_again(name, folders, tmp_path):
    model, folder = folders(name)
    quantize_checkpoint(folder, tmp_path / "small", CONFIG)
    dequantize_checkpoint(tmp_path / "small", tmp_path / "back")
    found, ours = load(type(model), tmp_path / "back"), fourbit.quantize_model(load(type(model), folder), CONFIG)
    assert any(type(m) is Conv1D for m in found.modules())
    torch.testing.assert_close(outputs(found), outputs(ours), rtol=1e-4, atol=1e-4)
    compared = compare_checkpoints(folder, tmp_path / "small")
    assert not compared.errors and all(t.identical or t.sqnr_db > 15 for t in compared.tensors)


@pytest.mark.parametrize("double_quant", (False, True))
def test_a_folder_of_bitsandbytes_is_one_of_ours(folders, tmp_path, double_quant):
    bitsandbytes()
    model, folder = folders("GPT2LMHeadModel")
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double_quant}
    how |= {"bnb_4bit_compute_dtype": "float32"}
    theirs = load(type(model), folder, quantization_config=transformers.BitsAndBytesConfig(**how))
    theirs.save_pretrained(tmp_path / "theirs")
    quantize_checkpoint(folder, tmp_path / "ours", fourbit.QuantConfig(blocksize=64, double_quant=double_quant))
    same = compare_checkpoints(tmp_path / "ours", tmp_path / "theirs")
    assert not same.errors and not same.only_in_a and not same.only_in_b
    for t in same.tensors:
        assert t.identical or (double_quant and t.sqnr_db > 40), t  # its CPU path rounds a few scale codes otherwise
    dequantize_checkpoint(tmp_path / "theirs", tmp_path / "back")
    back = load(type(model), tmp_path / "back")
    torch.testing.assert_close(outputs(back), outputs(theirs), rtol=1e-4, atol=1e-4)
    compared = compare_checkpoints(folder, tmp_path / "theirs")
    assert not compared.errors and all(t.identical or t.sqnr_db > 15 for t in compared.tensors)


def test_as_the_hub_has_it(folders, tmp_path):
    """Without the base model's prefix, and with the masks that old versions saved."""
    from safetensors.torch import load_file, save_file

    model, folder = folders("GPT2LMHeadModel")
    shutil.copytree(folder, tmp_path / "hub")
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril(), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(tensors, tmp_path / "hub" / "model.safetensors", metadata={"format": "pt"})
    planned = quantize_checkpoint(tmp_path / "hub", tmp_path / "small", CONFIG).plan
    names = {t.name for t in planned.quantized}
    assert names == {f"h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    want = outputs(fourbit.quantize_model(load(type(model), folder), CONFIG))
    assert torch.equal(outputs(load(type(model), tmp_path / "small")), want)
    dequantize_checkpoint(tmp_path / "small", tmp_path / "back")
    torch.testing.assert_close(outputs(load(type(model), tmp_path / "back")), want, rtol=1e-4, atol=1e-4)
    bitsandbytes()
    theirs = load(type(model), tmp_path / "small", config=for_bitsandbytes(tmp_path / "small"))
    torch.testing.assert_close(outputs(theirs), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ("LoRA", "DoRA", "IA3"))
def test_peft_takes_it_for_a_linear_layer(method, folders):
    if not installed("peft"):
        skip_or_fail("peft is not installed: adapters are not tried")
    import peft

    model, folder = folders("GPT2LMHeadModel")
    base = fourbit.quantize_model(load(type(model), folder), CONFIG)
    before, targets = outputs(base), ["c_attn", "c_proj", "c_fc"]
    if method == "IA3":
        config = peft.IA3Config(target_modules=targets, feedforward_modules=["c_fc"])
    else:
        config = peft.LoraConfig(r=4, target_modules=targets, use_dora=method == "DoRA")
    adapted = peft.get_peft_model(base, config).eval()
    assert sum(isinstance(m, Conv1D4bit) for m in adapted.modules()) == 4
    torch.testing.assert_close(outputs(adapted), before, rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = torch.arange(8)[None], []
    for _ in range(8):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    trained = outputs(adapted)
    assert not torch.allclose(trained, before, rtol=1e-3, atol=1e-3)
    merged = adapted.merge_and_unload()
    assert sum(isinstance(m, Conv1D4bit) for m in merged.modules()) == 4
    assert (outputs(merged) - trained).norm() < 0.3 * (trained - trained.mean()).norm()  # requantized


def test_an_adapter_of_the_16_bit_model_fits(folders, tmp_path):
    """Its matrices are the same, whichever way round the weight is held."""
    if not installed("peft"):
        skip_or_fail("peft is not installed: adapters are not tried")
    import peft

    model, folder = folders("GPT2LMHeadModel")
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], init_lora_weights=False, fan_in_fan_out=True)
    torch.manual_seed(1)
    plain = peft.get_peft_model(load(type(model), folder), config).eval()
    plain.save_pretrained(tmp_path / "adapter")
    base = fourbit.quantize_model(load(type(model), folder), CONFIG)
    ours = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with ours.disable_adapter():
        off = outputs(ours)
    moved = outputs(plain) - outputs(load(type(model), folder))
    assert ((outputs(ours) - off) - moved).norm() < 0.3 * moved.norm()


@pytest.mark.parametrize("dora", (False, True))
def test_quantized_and_dequantized_within_an_adapter(dora, folders):
    """peft's layers hold fan_in_fan_out; a square matrix the wrong way round would go unnoticed."""
    if not installed("peft"):
        skip_or_fail("peft is not installed: adapters are not tried")
    import peft

    model, folder = folders("GPT2LMHeadModel")
    targets = ["c_attn", "attn.c_proj"]
    how = {"target_modules": targets, "init_lora_weights": False, "use_dora": dora, "fan_in_fan_out": True}
    torch.manual_seed(1)
    adapted = peft.get_peft_model(load(type(model), folder), peft.LoraConfig(r=4, **how)).eval()
    before = outputs(adapted)
    fourbit.quantize_model(adapted, CONFIG)
    assert sum(isinstance(m, Conv1D4bit) for m in adapted.modules()) == 4
    small = outputs(adapted)
    assert 0 < (small - before).norm() < 0.4 * before.norm()
    fourbit.dequantize_model(adapted)
    assert sum(type(m) is Conv1D for m in adapted.modules()) == 4
    torch.testing.assert_close(outputs(adapted), small, rtol=1e-4, atol=1e-4)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(outputs(merged), small, rtol=1e-4, atol=1e-4)


def test_dequantized_in_memory_it_is_what_it_was(folders, tmp_path):
    model, folder = folders("GPT2LMHeadModel")
    found = fourbit.quantize_model(load(type(model), folder), CONFIG)
    first, second = (found.transformer.h[0].attn.c_proj, found.transformer.h[0].attn.c_attn)
    values, want = first.dequantize(), outputs(found)
    fourbit.dequantize_model(found)
    assert {type(m) for m in (found.transformer.h[0].attn.c_proj, found.transformer.h[0].attn.c_attn)} == {Conv1D}
    assert torch.equal(found.transformer.h[0].attn.c_proj.weight, values.T) and second.bias is not None
    torch.testing.assert_close(outputs(found), want, rtol=1e-4, atol=1e-4)
    found.save_pretrained(tmp_path / "plain")
    torch.testing.assert_close(outputs(load(type(model), tmp_path / "plain")), want, rtol=1e-4, atol=1e-4)
