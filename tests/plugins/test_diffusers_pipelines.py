"""Pipelines of diffusers with components in 4 bits, and adapters on them."""

from __future__ import annotations

import json

import pytest
import torch

import fourbit
from fourbit.nn import Linear4bit, PackedModule
from tests.plugins import diffusers_models as tiny
from tests.support import installed, skip_or_fail

if not all(installed(name) for name in ("diffusers", "transformers", "peft")):
    skip_or_fail("diffusers, transformers or peft is not installed: pip install 'fourbit[test]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

COMPONENTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("pipeline"))


def load(folder, **options):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def image(pipe):
    """What it paints for the same tokens and noise."""
    embeds = pipe.text_encoder(torch.arange(16).reshape(1, 16)).last_hidden_state
    return pipe(
        prompt_embeds=embeds,
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images


def packed_layers(pipe, component):
    return {name for name, m in getattr(pipe, component).named_modules() if isinstance(m, PackedModule)}


def by_mapping():
    from diffusers.quantizers import PipelineQuantizationConfig

    import fourbit_diffusers
    import fourbit_transformers

    ours = fourbit_diffusers.FourbitConfig(double_quant=True)
    theirs = fourbit_transformers.FourbitConfig(double_quant=True)
    return PipelineQuantizationConfig(quant_mapping={"unet": ours, "vae": ours, "text_encoder": theirs})


def by_one_mapping():
    """One FourbitConfig, of either library, does for every component."""
    from diffusers.quantizers import PipelineQuantizationConfig

    import fourbit_diffusers  # noqa: F401
    import fourbit_transformers

    config = fourbit_transformers.FourbitConfig(double_quant=True)
    return PipelineQuantizationConfig(quant_mapping=dict.fromkeys(COMPONENTS, config))


def by_name():
    from diffusers.quantizers import PipelineQuantizationConfig

    import fourbit_diffusers  # noqa: F401
    import fourbit_transformers  # noqa: F401

    return PipelineQuantizationConfig(quant_backend="fourbit", quant_kwargs={"double_quant": True})


@pytest.mark.parametrize("configured", (by_mapping, by_one_mapping, by_name))
def test_components(folder, tmp_path, configured):
    """Quantized while they load, by the pipeline's own configuration; saved, and loaded without any."""
    pipe = load(folder, quantization_config=configured())
    in_memory = load(folder)
    for name in COMPONENTS:
        fourbit.quantize_model(getattr(in_memory, name), fourbit.QuantConfig(double_quant=True))
        assert packed_layers(pipe, name) == packed_layers(in_memory, name) != set()
    painted = image(pipe)
    assert torch.equal(image(in_memory), painted) and not torch.equal(image(load(folder)), painted)
    for each, name in ((pipe, "a"), (in_memory, "b")):
        each.save_pretrained(tmp_path / name)
        for component in COMPONENTS:
            settings = json.loads((tmp_path / name / component / "config.json").read_text())
            assert settings["quantization_config"]["fourbit"]["double_quant"] is True
        back = load(tmp_path / name)
        assert all(packed_layers(back, component) == packed_layers(pipe, component) for component in COMPONENTS)
        assert torch.equal(image(back), painted)


def test_one_component(folder, tmp_path):
    from diffusers import PipelineQuantizationConfig

    from fourbit_diffusers import FourbitConfig

    config = PipelineQuantizationConfig(quant_mapping={"unet": FourbitConfig("fp4")})
    pipe = load(folder, quantization_config=config, torch_dtype=torch.bfloat16)
    assert packed_layers(pipe, "unet") and not packed_layers(pipe, "vae") and not packed_layers(pipe, "text_encoder")
    assert pipe.unet.dtype == pipe.vae.dtype == torch.bfloat16
    pipe.save_pretrained(tmp_path / "4")
    assert torch.equal(image(load(tmp_path / "4", torch_dtype=torch.bfloat16)), image(pipe))


def test_adapters(folder, tmp_path):
    """LoRA on 4-bit layers: trains, is saved by diffusers, loads onto another 4-bit pipeline, fuses and goes again."""
    from diffusers import PipelineQuantizationConfig, StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from fourbit_diffusers import FourbitConfig

    def quantized():
        return load(folder, quantization_config=PipelineQuantizationConfig(quant_mapping={"unet": FourbitConfig()}))

    pipe = quantized()
    before = image(pipe)
    unet = pipe.unet
    unet.add_adapter(
        LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    )
    wrapped = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert isinstance(wrapped.base_layer, Linear4bit)
    trained = [p for p in unet.parameters() if p.requires_grad]
    assert trained and all(p.is_floating_point() for p in trained)
    optimizer = torch.optim.SGD(trained, lr=1.0)
    torch.manual_seed(0)
    losses = []
    for _ in range(4):
        noise = unet(torch.ones(1, 4, 8, 8), torch.tensor([3]), torch.ones(1, 5, 64)).sample
        loss = (noise - 1).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    painted = image(pipe)
    assert not torch.equal(painted, before)
    with pytest.raises(ValueError, match="adapter"):  # whose names no from_pretrained would know
        unet.save_pretrained(tmp_path / "no")
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    other = quantized()
    other.load_lora_weights(tmp_path / "lora")
    assert torch.allclose(image(other), painted, atol=1e-5)
    other.unload_lora_weights()
    assert torch.equal(image(other), before)
    other.unet.save_pretrained(tmp_path / "4")
    assert torch.equal(tiny.run(type(unet).from_pretrained(tmp_path / "4")), tiny.run(quantized().unet))
    # merged into 16 bit, and saved so
    pipe.unet.dequantize()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.allclose(image(pipe), painted, atol=1e-4)
    pipe.unet.save_pretrained(tmp_path / "16")
    pipe.unet = type(unet).from_pretrained(tmp_path / "16")
    assert torch.allclose(image(pipe), painted, atol=1e-4)
