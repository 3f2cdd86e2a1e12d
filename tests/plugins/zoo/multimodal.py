"""Models of images and text."""

from __future__ import annotations

import torch

from tests.plugins.zoo.entry import GROUPED, SMALL, VIT, Entry

IMAGE_TOKEN = 120


def _seen(images, **more):
    """`images` image tokens between others."""
    ids = torch.tensor([[10, 11, *[IMAGE_TOKEN] * images, 12, 13, 14]])
    kinds = (ids == IMAGE_TOKEN).int()  # which of them are an image's
    return {"input_ids": ids, "mm_token_type_ids": kinds, **more}


def _patches(count, grid, size):
    """As the processors of Qwen's models give them: flat patches, and how many lie along each axis."""

    def make():
        tokens = count // 4  # two by two become one
        return _seen(tokens, pixel_values=torch.randn(count, size), image_grid_thw=torch.tensor([grid]))

    return make


def _picture(images, size=16, **shape):
    return lambda: _seen(images, pixel_values=torch.randn(1, 3, size, size))


_TEXT = {**GROUPED, "model_type": "llama"}
_TOKENS = {"image_token_id": IMAGE_TOKEN, "image_token_index": IMAGE_TOKEN}
_CLIP_TEXT = {**SMALL, "max_position_embeddings": 32, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 21}
_CLIP = {"text_config": _CLIP_TEXT, "vision_config": VIT, "projection_dim": 64}
_CLIP_VISION = {**VIT, "model_type": "clip_vision_model", "projection_dim": 64}
_SIGLIP_VISION = {**VIT, "model_type": "siglip_vision_model"}
_GEMMA = {**GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16}
_MROPE = {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3]}
_QWEN_TEXT = {**GROUPED, "rope_scaling": _MROPE, "rope_parameters": {**_MROPE, "rope_theta": 10000.0}}
_QWEN_TOKENS = {"image_token_id": IMAGE_TOKEN, "video_token_id": 121, "vision_start_token_id": 122}
_QWEN2_VISION = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
_QWEN25_VISION = {"depth": 1, "hidden_size": 64, "out_hidden_size": 64, "num_heads": 4, "patch_size": 4}
_QWEN25_VISION |= {"intermediate_size": 128, "window_size": 16, "fullatt_block_indexes": [0]}
_QWEN3_VISION = {"depth": 1, "hidden_size": 64, "out_hidden_size": 64, "num_heads": 4, "patch_size": 4}
_QWEN3_VISION |= {"intermediate_size": 128, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
_INTERN_VISION = {**VIT, "image_size": [16, 16], "patch_size": [4, 4], "model_type": "internvl_vision"}
_PIXTRAL = {**VIT, "model_type": "pixtral", "head_dim": 16, "patch_size": 4}
_BLIP_QFORMER = {**SMALL, "pad_token_id": 0, "encoder_hidden_size": 64, "max_position_embeddings": 32}
_BLIP_TEXT = {"model_type": "opt", "vocab_size": 128, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 1}
_BLIP_TEXT |= {"num_attention_heads": 4, "word_embed_proj_dim": 64, "max_position_embeddings": 64, "pad_token_id": 1}
_BLIP = {"vision_config": VIT, "qformer_config": _BLIP_QFORMER, "text_config": _BLIP_TEXT, "num_query_tokens": 4}


def _multimodal(kind, config, inputs, **more):
    return Entry(kind, "vision-language", config, inputs, **more)


def _idefics():
    return _seen(1, pixel_values=torch.randn(1, 1, 3, 16, 16))


def _llava_next():
    return _seen(10, pixel_values=torch.randn(1, 2, 3, 16, 16), image_sizes=torch.tensor([[16, 16]]))


def _pairs():
    return {"input_ids": torch.arange(10, 34).view(2, 12), "pixel_values": torch.randn(2, 3, 16, 16)}


_VIT_GPT2 = {
    "encoder": {**VIT, "model_type": "vit"},
    "decoder": {"model_type": "gpt2", "vocab_size": 128, "n_embd": 64},
}
_VIT_GPT2["decoder"] |= {"n_layer": 1, "n_head": 4, "add_cross_attention": True, "is_decoder": True}


def _described():
    return {"pixel_values": torch.randn(1, 3, 16, 16), "decoder_input_ids": torch.arange(10, 18)[None]}


MULTIMODAL = (
    _multimodal("VisionEncoderDecoderModel", _VIT_GPT2, _described, variant="ViT, GPT-2"),
    _multimodal("CLIPModel", _CLIP, _pairs, output="logits_per_image"),
    _multimodal(
        "SiglipModel",
        {"text_config": {**SMALL, "max_position_embeddings": 32}, "vision_config": VIT},
        _pairs,
        output="logits_per_image",
    ),
    _multimodal(
        "LlavaForConditionalGeneration",
        {"text_config": _TEXT, "vision_config": _CLIP_VISION, **_TOKENS, "vision_feature_layer": -1},
        _picture(4),
        daily=True,
    ),
    _multimodal(
        "LlavaNextForConditionalGeneration",
        {
            "text_config": _TEXT,
            "vision_config": _CLIP_VISION,
            **_TOKENS,
            "vision_feature_layer": -1,
            "image_grid_pinpoints": [[16, 16]],
        },
        _llava_next,
    ),
    _multimodal(
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": {**GROUPED, "head_dim": 16, "model_type": "gemma"},
            "vision_config": _SIGLIP_VISION,
            "projection_dim": 64,
            **_TOKENS,
        },
        _picture(4),
    ),
    _multimodal(
        "Gemma3ForConditionalGeneration",
        {"text_config": _GEMMA, "vision_config": _SIGLIP_VISION, "mm_tokens_per_image": 4, **_TOKENS},
        _picture(4),
        daily=True,
    ),
    _multimodal(
        "Qwen2VLForConditionalGeneration",
        {"text_config": _QWEN_TEXT, "vision_config": _QWEN2_VISION, **_QWEN_TOKENS},
        _patches(16, [1, 4, 4], 96),
    ),
    _multimodal(
        "Qwen2_5_VLForConditionalGeneration",
        {"text_config": _QWEN_TEXT, "vision_config": _QWEN25_VISION, **_QWEN_TOKENS},
        _patches(16, [1, 4, 4], 96),
        daily=True,
    ),
    _multimodal(
        "Qwen3VLForConditionalGeneration",
        {"text_config": {**_QWEN_TEXT, "head_dim": 16}, "vision_config": _QWEN3_VISION, **_QWEN_TOKENS},
        _patches(16, [1, 4, 4], 96),
    ),
    _multimodal(
        "InternVLForConditionalGeneration",
        {"text_config": _TEXT, "vision_config": _INTERN_VISION, **_TOKENS},
        _picture(4),
    ),
    _multimodal(
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {**GROUPED, "model_type": "mistral", "head_dim": 16},
            "vision_config": _PIXTRAL,
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
            **_TOKENS,
        },
        lambda: {**_picture(4)(), "image_sizes": torch.tensor([[16, 16]])},
    ),
    _multimodal(
        "Idefics3ForConditionalGeneration",
        {"text_config": _TEXT, "vision_config": VIT, "scale_factor": 2, **_TOKENS},
        _idefics,
    ),
    _multimodal("Blip2ForConditionalGeneration", {**_BLIP, **_TOKENS}, _picture(4)),
)
