"""Tiny models of diffusers with random weights, and one forward pass of each."""

from __future__ import annotations

import torch

from fourbit.nn import PackedModule

KINDS = ("unet", "flux", "sd3", "autoencoder", "wan")


def build(kind):
    """A model in float32, in eval mode; always the same one."""
    import diffusers

    torch.manual_seed(0)
    name, settings = _MODELS[kind]
    return getattr(diffusers, name)(**settings).eval()


def packed(model):
    """Everything that the 4-bit layers hold, by name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            codes, state = module.quant_state()
            found |= {f"{name}.weight": codes, **state.to_state_dict(f"{name}.weight.")}
    return found


def assert_same(one, other):
    """Equal bits in every 4-bit layer, equal values in all else."""
    a, b = packed(one), packed(other)
    assert a and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    assert all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


def folder_of(kind, tmp_path):
    """The class of such a model, and a folder of it in float32."""
    model = build(kind)
    model.save_pretrained(tmp_path / "16")
    return type(model), tmp_path / "16"


def save_pipeline(folder):
    """Stable Diffusion in tiny, of models of both libraries; returns the folder."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    diffusers.utils.logging.disable_progress_bar()
    unet, vae = build("unet"), build("autoencoder")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=100, bos_token_id=98, eos_token_id=99, max_position_embeddings=16, **sizes)
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(config).eval(),
        tokenizer=CLIPTokenizer(),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


@torch.no_grad()
def run(model):
    """Its output for the same random input, in the model's dtype."""
    kind = next(kind for kind, (name, _) in _MODELS.items() if name == type(model).__name__)
    return model(**inputs(kind, model.dtype)).sample


def inputs(kind, dtype=torch.float32):
    """The same random input each time."""
    torch.manual_seed(1)
    made = _INPUTS[kind]()
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in made.items()}


_MODELS = {
    "unet": (
        "UNet2DConditionModel",
        {
            "sample_size": 8,
            "layers_per_block": 1,
            "block_out_channels": (64, 128),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 64,
            "attention_head_dim": 16,
            "norm_num_groups": 8,
        },
    ),
    "flux": (
        "FluxTransformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": (4, 4, 8),
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 64,
            "out_channels": 4,
            "pos_embed_max_size": 8,
        },
    ),
    "autoencoder": (
        "AutoencoderKL",
        {
            "block_out_channels": (32, 64),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 8,
            "sample_size": 16,
        },
    ),
    "wan": (
        "WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 64,
            "freq_dim": 64,
            "ffn_dim": 128,
            "num_layers": 1,
            "cross_attn_norm": True,
            "rope_max_seq_len": 32,
        },
    ),
}

_INPUTS = {
    "unet": lambda: {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 5, 64),
    },
    "flux": lambda: {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
    },
    "sd3": lambda: {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([3]),
    },
    "autoencoder": lambda: {"sample": torch.randn(1, 3, 16, 16)},
    "wan": lambda: {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 5, 64),
    },
}
