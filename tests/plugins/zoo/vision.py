"""Models of images alone."""

from __future__ import annotations

import torch

from tests.plugins.zoo.entry import VIT, Entry, image, large_image, tokens

_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 64, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
_CONVNEXT = {"hidden_sizes": [64, 128], "depths": [1, 1], "num_stages": 2}
_SEGFORMER = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [64, 128]}
_SEGFORMER |= {"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]}
_SEGFORMER |= {"decoder_hidden_size": 64}
_RESNET = {"model_type": "resnet", "hidden_sizes": [16, 32], "depths": [1, 1], "embedding_size": 16}
_RESNET |= {"layer_type": "basic", "out_features": ["stage2"]}
_DETR = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
_DETR |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_queries": 5}
_DETR |= {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": _RESNET}
_STAGES = {"stage_in_channels": [8, 16, 32, 64], "stage_mid_channels": [8] * 4, "stage_num_blocks": [1] * 4}
_STAGES |= {"stage_out_channels": [16, 32, 64, 64], "stage_numb_of_layers": [1] * 4, "stem_channels": [3, 8, 8]}
_STAGES |= {"model_type": "hgnet_v2", "hidden_sizes": [16, 32, 64, 64], "out_features": ["stage2", "stage3", "stage4"]}
_QUERIES = {"d_model": 64, "encoder_hidden_dim": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_layers": 2}
_QUERIES |= {"num_queries": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
_QUERIES |= {"decoder_in_channels": [64, 64, 64]}
_DFINE = {**_QUERIES, "backbone_config": _STAGES, "encoder_in_channels": [32, 64, 64]}
_RT_STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1] * 4, "model_type": "rt_detr_resnet"}
_RT_STAGES |= {"out_features": ["stage2", "stage3", "stage4"]}
_RTDETR = {**_QUERIES, "backbone_config": _RT_STAGES, "encoder_in_channels": [16, 32, 64]}
_IMAGE_GPT = {"vocab_size": 128, "n_embd": 64, "n_layer": 1, "n_head": 4}
_MAE = {**VIT, "decoder_hidden_size": 64, "decoder_intermediate_size": 128, "decoder_num_hidden_layers": 1}


def _vision(kind, config, *, inputs=image, **more):
    return Entry(kind, "vision", config, inputs, **more)


def _masked():
    return {"pixel_values": torch.randn(1, 3, 16, 16), "noise": torch.rand(1, 4)}


VISION = (
    _vision("ViTForImageClassification", VIT, daily=True),
    _vision("DeiTForImageClassification", VIT),
    _vision("BeitForImageClassification", VIT),
    _vision("SwinForImageClassification", _SWIN, inputs=large_image),
    _vision("ConvNextForImageClassification", _CONVNEXT, inputs=large_image),
    _vision("Dinov2Model", {**VIT, "mlp_ratio": 2}, output="last_hidden_state"),
    _vision(
        "Dinov2Model",
        {**VIT, "mlp_ratio": 6, "use_swiglu_ffn": True},
        output="last_hidden_state",
        variant="SwiGLU",
        daily=True,
    ),
    _vision("DINOv3ViTModel", VIT, output="last_hidden_state"),
    _vision("SegformerForSemanticSegmentation", _SEGFORMER, inputs=large_image),
    _vision("DetrForObjectDetection", _DETR, inputs=large_image),
    _vision("DFineForObjectDetection", _DFINE, inputs=large_image),
    _vision("RTDetrV2ForObjectDetection", _RTDETR, inputs=large_image),
    _vision("ImageGPTForCausalImageModeling", _IMAGE_GPT, inputs=tokens),
    _vision("ViTMAEForPreTraining", {**_MAE, "decoder_num_attention_heads": 4}, inputs=_masked),
)
