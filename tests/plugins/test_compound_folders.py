"""Pipelines of diffusers and sentence encoders, as their own libraries write and read them, through `fourbit`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import fourbit
from fourbit.checkpoint.compare import compare_checkpoints
from fourbit.checkpoint.compound import Compound
from fourbit.checkpoint.dequantize import dequantize_checkpoint
from fourbit.checkpoint.quantize import quantize_checkpoint
from fourbit.checkpoint.verify import verify_checkpoint
from tests.support import installed, skip_or_fail

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture
def pipeline(tmp_path):
    """A tiny Stable Diffusion, and the folder that its save_pretrained makes."""
    if not installed("diffusers"):
        skip_or_fail("diffusers is not installed: pip install 'fourbit[test]'")
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    places = {"max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    (tmp_path / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    made = StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            norm_num_groups=8,
        ),
        vae=AutoencoderKL(
            block_out_channels=[32, 64],
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            norm_num_groups=8,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=100, **sizes, **places)),
        tokenizer=CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=16),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(tmp_path / "src")
    return made


def image(pipe):
    options = {"num_inference_steps": 2, "output_type": "np", "height": 16, "width": 16}
    return pipe("a b", generator=torch.Generator().manual_seed(1), **options).images


@pytest.mark.parametrize("size", (None, "60KB"))
def test_a_pipeline_of_diffusers(pipeline, tmp_path, size):
    """The models say which layers are linear; dequantized, it loads and draws what its weights say."""
    from diffusers import StableDiffusionPipeline

    report = quantize_checkpoint(tmp_path / "src", tmp_path / "4", max_shard_size=size)
    by = {name: plan.described_by.partition(" of ")[0] for name, plan in report.plans.items()}
    assert by == {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel", "vae": ""}
    assert not report.left_out and not report.skipped and verify_checkpoint(tmp_path / "4").ok
    dequantize_checkpoint(tmp_path / "4", tmp_path / "16", max_shard_size=size)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "16")
    loaded.set_progress_bar_config(disable=True)
    quantized = {t.name for t in report.plan.quantized}
    for name in ("unet", "text_encoder", "vae"):
        model = getattr(pipeline, name)
        linear = {f"{name}/{part}.weight" for part, each in model.named_modules() if type(each) is torch.nn.Linear}
        mine = {tensor for tensor in quantized if tensor.startswith(f"{name}/")}
        assert mine == (set() if name == "vae" else linear)
        read = getattr(loaded, name).state_dict()
        for key, tensor in model.state_dict().items():
            want = tensor
            if f"{name}/{key}" in quantized:
                want = fourbit.dequantize_4bit(*fourbit.quantize_4bit(tensor))
                with torch.no_grad():
                    tensor.copy_(want)
            assert torch.equal(read[key], want), (name, key)
    assert np.array_equal(image(loaded), image(pipeline))


def test_a_component_in_4_bits_loads_by_itself(pipeline, tmp_path):
    """transformers reads a text encoder of the pipeline, with bitsandbytes or, once it is imported, with fourbit."""
    if not installed("bitsandbytes"):
        skip_or_fail("bitsandbytes is not installed")
    from transformers import CLIPTextModel

    quantize_checkpoint(tmp_path / "src", tmp_path / "4", fourbit.QuantConfig(double_quant=True))
    loaded = CLIPTextModel.from_pretrained(tmp_path / "4" / "text_encoder")
    with Compound(tmp_path / "4") as written:
        names = {name for name in written.quantized() if name.startswith("text_encoder/")}
        four = {f"text_encoder/{n}.weight": m for n, m in loaded.named_modules() if type(m).__name__ == "Linear4bit"}
        assert set(four) == names and len(names) == 12
        for name, module in four.items():
            packed, state = written.read_4bit(name)
            if hasattr(module.weight, "quant_state"):  # bitsandbytes', which dequantizes rows as short as these wrongly
                assert torch.equal(module.weight.data.reshape(-1), packed.reshape(-1))
            else:
                assert torch.equal(module.weight.detach() + 0, fourbit.dequantize_4bit(packed, state))


@pytest.fixture
def encoder(tmp_path):
    """A tiny sentence encoder with a Dense module, and the folder that its save makes."""
    for name in ("sentence-transformers", "bitsandbytes"):
        if not installed(name):
            skip_or_fail(f"{name} is not installed: pip install 'fourbit[test]'")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    bert = tmp_path / "bert"
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(bert)
    BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt")).save_pretrained(bert)
    transformer = modules.Transformer(str(bert))
    pooling = modules.Pooling(64)
    made = SentenceTransformer(modules=[transformer, pooling, modules.Dense(64, 32)], device="cpu")
    made.save(str(tmp_path / "src"))
    return made


def test_a_sentence_encoder(encoder, tmp_path):
    """Its Dense module stays as it is; embeddings are those of the dequantized folder."""
    from sentence_transformers import SentenceTransformer

    report = quantize_checkpoint(tmp_path / "src", tmp_path / "4", max_shard_size="20KB")
    assert [name for name in report.plans if name] == ["2_Dense"] and len(report.plans[""].quantized) == 13
    dequantize_checkpoint(tmp_path / "4", tmp_path / "16")
    assert not compare_checkpoints(tmp_path / "src", tmp_path / "16").errors
    four, plain = (SentenceTransformer(str(tmp_path / name), device="cpu") for name in ("4", "16"))
    dense = [torch.cat([p.flatten() for p in each[2].parameters()]) for each in (encoder, four, plain)]
    assert torch.equal(dense[0], dense[1]) and torch.equal(dense[0], dense[2])
    texts = ["a b c", "c a", "b"]
    a, b, c = (each.encode(texts) for each in (encoder, four, plain))
    assert np.abs(b - c).max() < 0.02 * np.abs(c).max() and np.abs(a - c).max() > 1e-4
