"""Tiny transformers models of many classes, for the tests of plans and of the folders that follow from them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as T

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
BERT = {**SMALL, "pad_token_id": 0, "max_position_embeddings": 64}
T5 = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
WHISPER = {
    **{"vocab_size": 128, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_mel_bins": 8},
    **{"max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1},
    **{"eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
}
VIT = {key: SMALL[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
VIT |= {"image_size": 16, "patch_size": 8}
MAMBA = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 1, "state_size": 16}
MUSIC = {"vocab_size": 128, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 1, "num_attention_heads": 4}


def llava():
    text, vision = T.LlamaConfig(**GROUPED), T.CLIPVisionConfig(**VIT)
    return T.LlavaForConditionalGeneration(T.LlavaConfig(vision_config=vision, text_config=text, image_token_index=5))


def qwen2_vl():
    text = {**GROUPED, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    return T.Qwen2VLForConditionalGeneration(T.Qwen2VLConfig(text_config=text, vision_config=vision))


MODELS = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**GROUPED)),
    "llama tied": lambda: T.LlamaForCausalLM(T.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "llama base": lambda: T.LlamaModel(T.LlamaConfig(**GROUPED)),
    "gpt-neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**SMALL)),
    "falcon": lambda: T.FalconForCausalLM(
        T.FalconConfig(**{k: v for k, v in SMALL.items() if k != "intermediate_size"}, alibi=False)
    ),
    "mamba2": lambda: T.Mamba2ForCausalLM(
        T.Mamba2Config(**MAMBA, num_heads=8, head_dim=16, n_groups=1, bos_token_id=None, eos_token_id=None)
    ),
    "mamba": lambda: T.MambaForCausalLM(T.MambaConfig(**MAMBA)),
    "gpt2": lambda: T.GPT2LMHeadModel(
        T.GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=4, bos_token_id=None, eos_token_id=None)
    ),
    "t5": lambda: T.T5ForConditionalGeneration(T.T5Config(**T5)),
    "t5 untied": lambda: T.T5ForConditionalGeneration(T.T5Config(**T5, tie_word_embeddings=False)),
    "bert mlm": lambda: T.BertForMaskedLM(T.BertConfig(**BERT)),
    "bert classifier": lambda: T.BertForSequenceClassification(T.BertConfig(**BERT)),
    "roberta mlm": lambda: T.RobertaForMaskedLM(T.RobertaConfig(**BERT)),
    "roberta classifier": lambda: T.RobertaForSequenceClassification(T.RobertaConfig(**BERT)),
    "whisper": lambda: T.WhisperForConditionalGeneration(T.WhisperConfig(**WHISPER)),
    "musicgen decoder": lambda: T.MusicgenForCausalLM(
        T.MusicgenDecoderConfig(**MUSIC, num_codebooks=2, pad_token_id=128, bos_token_id=None)
    ),
    "vit": lambda: T.ViTForImageClassification(T.ViTConfig(**VIT)),
    "siglip": lambda: T.SiglipModel(
        T.SiglipConfig(text_config={**SMALL, "max_position_embeddings": 16}, vision_config=VIT)
    ),
    "llava": llava,
    "qwen2-vl": qwen2_vl,
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3-moe": lambda: T.Qwen3MoeForCausalLM(
        T.Qwen3MoeConfig(**GROUPED, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, head_dim=16)
    ),
    "granite-moe": lambda: T.GraniteMoeForCausalLM(
        T.GraniteMoeConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    ),
    "hunyuan-moe": lambda: T.HunYuanMoEV1ForCausalLM(
        T.HunYuanMoEV1Config(**GROUPED, num_experts=4, moe_topk=[2], head_dim=16)
    ),
}
OF_OTHER_LAYERS = ("falcon",)
"""Those of which nothing is quantized: FalconLinear is no nn.Linear."""

FUSED_EXPERTS = ("mixtral", "qwen3-moe", "granite-moe", "hunyuan-moe")
"""Their experts are 3-D in memory, which transformers with bitsandbytes cannot load in 4 bit."""


def make(build: str | Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """One of MODELS in bfloat16, its weights random but the same each time; no two values of a row are equal."""
    torch.manual_seed(0)
    model = (MODELS[build] if isinstance(build, str) else build)().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some are left uninitialized
            if parameter.dim() > 1:
                parameter.normal_(std=0.05)
    return model.bfloat16()
