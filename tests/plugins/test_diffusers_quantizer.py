"""Models of diffusers in 4 bits by its own from_pretrained and save_pretrained."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourbit
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.nn import Linear4bit, PackedModule
from tests.plugins import diffusers_models as tiny
from tests.plugins.diffusers_models import assert_same, folder_of, packed
from tests.support import installed, skip_or_fail

if not installed("diffusers"):
    skip_or_fail("diffusers is not installed: pip install 'fourbit[test]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(autouse=True)
def quiet():
    import diffusers

    diffusers.utils.logging.disable_progress_bar()


def output(model):
    """Of a copy: weights that lie in a mapped file are not aligned, and torch's own kernels round otherwise there."""
    return tiny.run(copy.deepcopy(model))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_four_ways(kind, tmp_path):
    """On the fly, in memory, by the command, and each saved and loaded again: equal bits, equal outputs."""
    from fourbit_diffusers import FourbitConfig

    cls, src = folder_of(kind, tmp_path)
    config = fourbit.QuantConfig("fp4", double_quant=True)
    asked = FourbitConfig("fp4", double_quant=True)
    on_the_fly, info = cls.from_pretrained(src, quantization_config=asked, output_loading_info=True)
    assert not any(info.values())  # nothing missing, nothing unexpected
    in_memory = fourbit.quantize_model(cls.from_pretrained(src), config)
    quantize_checkpoint(src, tmp_path / "command", config)
    by_command = cls.from_pretrained(tmp_path / "command")
    outputs = [output(model) for model in (on_the_fly, in_memory, by_command)]
    assert_same(on_the_fly, in_memory)
    assert_same(on_the_fly, by_command)
    plain = cls.from_pretrained(src)
    planned = {step.name for step in fourbit.plan(plain, config).quantized}
    assert planned == {name for name in packed(on_the_fly) if name in plain.state_dict()}
    assert not torch.equal(output(plain), outputs[0])
    for number, model in enumerate((on_the_fly, in_memory, by_command)):
        model.save_pretrained(tmp_path / "first")
        model.save_pretrained(tmp_path / f"saved{number}")
        files = [sorted((tmp_path / name).iterdir()) for name in ("first", f"saved{number}")]
        assert all(one.read_bytes() == other.read_bytes() for one, other in zip(*files, strict=True))
        loaded, info = cls.from_pretrained(tmp_path / f"saved{number}", output_loading_info=True)
        assert not any(info.values())
        assert_same(loaded, on_the_fly)
        assert torch.equal(output(loaded), outputs[number]) and torch.equal(outputs[number], outputs[0])


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_dtypes(tmp_path, dtype):
    """torch_dtype holds for what is quantized and what is not; it comes back without being asked for."""
    from fourbit_diffusers import FourbitConfig

    cls, src = folder_of("unet", tmp_path)
    model = cls.from_pretrained(src, torch_dtype=dtype, quantization_config=FourbitConfig(compute_dtype="float32"))
    in_memory = fourbit.quantize_model(
        cls.from_pretrained(src, torch_dtype=dtype), model.hf_quantizer.quantization_config.quant
    )
    assert_same(model, in_memory)
    assert model.dtype == dtype == model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.dtype
    model.save_pretrained(tmp_path / "4")
    back = cls.from_pretrained(tmp_path / "4")
    assert_same(model, back)
    assert back.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.compute_dtype == torch.float32
    assert cls.from_pretrained(tmp_path / "4", torch_dtype=torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match="float64.*compute in float32, bfloat16 or float16"):
        cls.from_pretrained(src, torch_dtype=torch.float64, quantization_config=FourbitConfig())


def test_sizes(tmp_path):
    """As many parameters as before, in as many bytes as there are."""
    from fourbit_diffusers import FourbitConfig

    cls, src = folder_of("unet", tmp_path)
    plain, model = cls.from_pretrained(src), cls.from_pretrained(src, quantization_config=FourbitConfig())
    assert model.num_parameters() == plain.num_parameters()
    tensors = (*model.parameters(), *model.buffers())
    assert model.get_memory_footprint() == sum(tensor.nbytes for tensor in tensors) < plain.get_memory_footprint()
    saved = fourbit.plan(plain)
    assert plain.get_memory_footprint() - model.get_memory_footprint() < saved.bytes_before - saved.bytes_after


def test_compiles_and_trains(tmp_path):
    """Fullgraph; and gradients flow through checkpointed 4-bit layers to what is trained."""
    from fourbit_diffusers import FourbitConfig

    cls, src = folder_of("sd3", tmp_path)
    model = cls.from_pretrained(src, quantization_config=FourbitConfig())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = tiny.inputs("sd3")
    with torch.no_grad():
        assert torch.allclose(compiled(**inputs).sample, model(**inputs).sample, atol=1e-6)
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        model.train().zero_grad()
        model(**inputs).sample.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert grads[0] and all(g is not None and torch.equal(g, h) for g, h in zip(*grads, strict=True))


def test_kept_in_float32(tmp_path):
    """What the model keeps in float32 is neither quantized nor cast."""
    from fourbit_diffusers import FourbitConfig

    cls, src = folder_of("wan", tmp_path)
    model = cls.from_pretrained(src, torch_dtype=torch.bfloat16, quantization_config=FourbitConfig())
    embedder = model.condition_embedder
    assert type(embedder.time_embedder.linear_1) is torch.nn.Linear
    assert embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert isinstance(embedder.time_proj, Linear4bit) and embedder.time_proj.bias.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "4")
    assert_same(model, cls.from_pretrained(tmp_path / "4"))


def test_skip_modules_and_configuration(tmp_path):
    from fourbit_diffusers import FourbitConfig

    cls, src = folder_of("unet", tmp_path)
    config = FourbitConfig(skip_modules=["attn2", "*.ff.*"], blocksize=128)
    model = cls.from_pretrained(src, quantization_config=config)
    names = [name for name, module in model.named_modules() if isinstance(module, PackedModule)]
    assert names and not any("attn2" in name or ".ff." in name for name in names)
    model.save_pretrained(tmp_path / "4")
    entry = json.loads((tmp_path / "4" / "config.json").read_text())["quantization_config"]
    assert entry["fourbit"]["skip_modules"] == ["attn2", "*.ff.*"] and entry["fourbit"]["blocksize"] == 128
    linear = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert set(entry["llm_int8_skip_modules"]) == linear and linear
    assert_same(model, cls.from_pretrained(tmp_path / "4"))
    assert config.left_modules == () and config.dtype is None  # the caller's own is left alone


def test_dequantize(tmp_path):
    """Back to 16 bit: the values that the 4-bit layers stand for, saved as any model is."""
    from fourbit_diffusers import FourbitConfig

    cls, src = folder_of("unet", tmp_path)
    model = cls.from_pretrained(src, quantization_config=FourbitConfig())
    weights = {n: m.dequantize() for n, m in model.named_modules() if isinstance(m, PackedModule)}
    want = tiny.run(model)
    back = model.dequantize()
    assert back is model and not any(isinstance(module, PackedModule) for module in model.modules())
    assert all(torch.equal(model.get_submodule(name).weight, w) for name, w in weights.items())
    assert torch.allclose(tiny.run(model), want, atol=1e-5)
    model.to(torch.bfloat16).to(torch.float32)
    model.save_pretrained(tmp_path / "16 again")
    assert "quantization_config" not in json.loads((tmp_path / "16 again" / "config.json").read_text())
    assert cls.from_pretrained(tmp_path / "16 again").dtype == torch.float32
    with pytest.raises(ValueError, match="first quantize"):
        model.dequantize()


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))))
def test_copies_are_saved_as_themselves(tmp_path, copied):
    from fourbit_diffusers import FourbitConfig

    cls, src = folder_of("unet", tmp_path)
    model = cls.from_pretrained(src, quantization_config=FourbitConfig())
    other = copied(model)
    layer = model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    layer.store(torch.randn(layer.weight_shape))
    other.save_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "model")
    assert_same(other, cls.from_pretrained(tmp_path / "other"))
    assert_same(model, cls.from_pretrained(tmp_path / "model"))
    assert not torch.equal(
        *(packed(m)["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"] for m in (model, other))
    )


def test_a_model_within_another(tmp_path):
    """quantize_model of what contains a model of diffusers: that one is saved in 4 bits, too."""
    cls, src = folder_of("unet", tmp_path)
    outer = torch.nn.ModuleDict({"unet": cls.from_pretrained(src), "head": torch.nn.Linear(64, 64)})
    fourbit.quantize_model(outer)
    outer["unet"].save_pretrained(tmp_path / "4")
    assert_same(outer["unet"], cls.from_pretrained(tmp_path / "4"))


def test_what_cannot_be_saved_or_loaded(tmp_path):
    from fourbit_diffusers import FourbitConfig

    cls, src = folder_of("unet", tmp_path)
    model = cls.from_pretrained(src, quantization_config=FourbitConfig())
    with pytest.raises(ValueError, match="safetensors"):
        model.save_pretrained(tmp_path / "no", safe_serialization=False)
    model.save_pretrained(tmp_path / "4")
    file = tmp_path / "4" / "diffusion_pytorch_model.safetensors"
    good = load_file(file)
    weight = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    meta = f"{weight}.quant_state.bitsandbytes__nf4"
    broken = {
        f"{weight}.absmax": (None, f"{weight}.absmax"),
        weight: (None, f"{weight}"),
        meta: (good[meta][:-1].clone(), "not valid JSON"),
        f"{weight}.quant_map": (good[f"{weight}.quant_map"] + 1, "quant_map is not the table"),
    }
    for name, (value, message) in broken.items():
        tensors = {**good, name: value}
        save_file({n: t for n, t in tensors.items() if t is not None}, file)
        with pytest.raises((ValueError, KeyError), match=message):
            cls.from_pretrained(tmp_path / "4")
    tensors = load_file(src / "diffusion_pytorch_model.safetensors")
    save_file({n: t for n, t in tensors.items() if n != weight}, src / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=f"{weight}: the folder has no such weight"):
        cls.from_pretrained(src, quantization_config=FourbitConfig())
    tensors[weight][0, 0] = float("nan")
    save_file(tensors, src / "diffusion_pytorch_model.safetensors")
    with pytest.raises(fourbit.NonFiniteError, match=weight):
        cls.from_pretrained(src, quantization_config=FourbitConfig())
    with pytest.raises(ValueError, match="quantizes nothing"):
        cls.from_pretrained(src, quantization_config=FourbitConfig(skip_modules=["*"]))
    for bad in ({"offload_experts": True}, {"quant_type": "int4"}, {"blocksize": 63}):
        with pytest.raises(ValueError, match=next(iter(bad)) if "quant_type" not in bad else "int4"):
            FourbitConfig(**bad)
    with pytest.raises(TypeError, match="'blcksize'"):
        FourbitConfig(blcksize=64)


def test_beside_another_quantizer(tmp_path):
    """4-bit layers of fourbit's in a model that another one quantized: there is no folder for that."""
    cls, src = folder_of("unet", tmp_path)
    model = cls.from_pretrained(src)
    model.hf_quantizer = object()
    fourbit.quantize_model(model)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()
