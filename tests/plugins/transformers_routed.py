"""Tiny transformers models whose names mislead: routers and gates of every make, tied layers, Conv1D and its likes."""

from __future__ import annotations

import transformers as T

from tests.plugins.transformers_models import GROUPED, SMALL, T5, VIT

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 1, "n_head": 4, "bos_token_id": None, "eos_token_id": None}
DEEPSEEK = {
    **{**SMALL, "num_hidden_layers": 2, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_routed_experts": 4},
    **{"moe_intermediate_size": 64, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    **{"kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
}
DETR = {
    **{"d_model": 64, "encoder_hidden_dim": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_layers": 2},
    **{"num_queries": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "decoder_in_channels": [64, 64, 64],
}


def jamba():
    sizes = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8, "use_mamba_kernels": False}
    return T.JambaForCausalLM(T.JambaConfig(**{**GROUPED, "num_hidden_layers": 2}, **sizes))


def nemotron_h():
    sizes = {key: value for key, value in GROUPED.items() if key != "num_hidden_layers"}
    sizes |= {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "head_dim": 16}
    sizes |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1}
    sizes |= {"moe_shared_expert_intermediate_size": 64, "topk_group": 1}
    return T.NemotronHForCausalLM(T.NemotronHConfig(**sizes, layers_block_type=["mamba", "moe", "attention"]))


def qwen3_next():
    sizes = {"head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2}
    sizes |= {"linear_num_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    sizes |= {"shared_expert_intermediate_size": 64, "layer_types": ["linear_attention", "full_attention"]}
    return T.Qwen3NextForCausalLM(T.Qwen3NextConfig(**{**GROUPED, "num_hidden_layers": 2}, **sizes))


def llama4():
    sizes = {"intermediate_size_mlp": 128, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 16}
    sizes = {**GROUPED, "num_hidden_layers": 2, "interleave_moe_layer_step": 2, **sizes}
    return T.Llama4ForCausalLM(T.Llama4TextConfig(**sizes))


def dbrx():
    attention, experts = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}, {"ffn_hidden_size": 64}
    experts |= {"moe_num_experts": 4, "moe_top_k": 2}
    sizes = {"vocab_size": 128, "d_model": 64, "n_heads": 4, "n_layers": 1, "max_seq_len": 64}
    return T.DbrxForCausalLM(T.DbrxConfig(**sizes, attn_config=attention, ffn_config=experts))


def switch():
    sizes = {**T5, "num_layers": 2, "num_decoder_layers": 2, "num_experts": 4}
    sizes |= {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    return T.SwitchTransformersForConditionalGeneration(T.SwitchTransformersConfig(**sizes))


def nllb_moe():
    sizes = {"vocab_size": 128, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "num_experts": 4}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
    sizes |= {"encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_sparse_step": 2, "decoder_sparse_step": 2}
    return T.NllbMoeForConditionalGeneration(T.NllbMoeConfig(**sizes))


def d_fine():
    stages = {"stage_in_channels": [8, 16, 32, 64], "stage_mid_channels": [8] * 4, "stage_num_blocks": [1] * 4}
    stages |= {"stage_out_channels": [16, 32, 64, 64], "stage_numb_of_layers": [1] * 4, "stem_channels": [3, 8, 8]}
    backbone = T.HGNetV2Config(**stages, out_features=["stage2", "stage3", "stage4"])
    return T.DFineForObjectDetection(T.DFineConfig(**DETR, backbone_config=backbone, encoder_in_channels=[32, 64, 64]))


def rt_detr_v2():
    stages = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1] * 4}
    backbone = T.RTDetrResNetConfig(**stages, out_features=["stage2", "stage3", "stage4"])
    return T.RTDetrV2ForObjectDetection(
        T.RTDetrV2Config(**DETR, backbone_config=backbone, encoder_in_channels=[16, 32, 64])
    )


def vit_gpt2():
    decoder = T.GPT2LMHeadModel(T.GPT2Config(**GPT2, add_cross_attention=True))
    return T.VisionEncoderDecoderModel(encoder=T.ViTModel(T.ViTConfig(**VIT)), decoder=decoder)


def clvp():
    sizes = {"vocab_size": 128, "hidden_size": 64, "n_inner": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    return T.ClvpForCausalLM(T.ClvpDecoderConfig(**sizes, num_mel_attn_blocks=1, feature_size=16))


ROUTED = {
    "jamba": jamba,
    "nemotron-h": nemotron_h,
    "qwen3-next": qwen3_next,
    "jetmoe": lambda: T.JetMoeForCausalLM(
        T.JetMoeConfig(**{**GROUPED, "intermediate_size": 64}, kv_channels=16, **EXPERTS)
    ),
    "phimoe": lambda: T.PhimoeForCausalLM(T.PhimoeConfig(**GROUPED, **EXPERTS)),
    "llama4": llama4,
    "deepseek-v2": lambda: T.DeepseekV2ForCausalLM(T.DeepseekV2Config(**DEEPSEEK)),
    "deepseek-v3": lambda: T.DeepseekV3ForCausalLM(T.DeepseekV3Config(**DEEPSEEK)),
    "dbrx": dbrx,
    "switch": switch,
    "nllb-moe": nllb_moe,
    "gpt-oss": lambda: T.GptOssForCausalLM(T.GptOssConfig(**GROUPED, **EXPERTS, head_dim=16)),
}
"""Of a mixture of experts, each with a router of another make."""

OTHERS = {
    "d-fine": d_fine,
    "rt-detr-v2": rt_detr_v2,
    "gpt-bigcode": lambda: T.GPTBigCodeForCausalLM(T.GPTBigCodeConfig(**GPT2)),
}
"""With gates that are no routers, linear layers that are tied, and nn.Linear under the names of GPT-2's Conv1D."""

CONV1D = {
    "openai-gpt": lambda: T.OpenAIGPTLMHeadModel(T.OpenAIGPTConfig(vocab_size=128, n_embd=64, n_layer=1, n_head=4)),
    "imagegpt": lambda: T.ImageGPTForCausalImageModeling(T.ImageGPTConfig(**GPT2)),
    "decision-transformer": lambda: T.DecisionTransformerModel(
        T.DecisionTransformerConfig(state_dim=8, act_dim=8, hidden_size=64, n_layer=1, n_head=4)
    ),
    "clvp": clvp,
    "gpt2 classifier": lambda: T.GPT2ForSequenceClassification(T.GPT2Config(**GPT2, pad_token_id=0)),
    "vit-gpt2": vit_gpt2,
}
"""With transformers' Conv1D."""
