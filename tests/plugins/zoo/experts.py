"""Mixtures of experts."""

from __future__ import annotations

from tests.plugins.zoo.entry import GROUPED, SMALL, Entry, tokens

_ROUTED = {"num_experts": 4, "num_experts_per_tok": 2}
_SHARED = {**_ROUTED, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
_DEEPSEEK = {**SMALL, "num_hidden_layers": 2, "num_key_value_heads": 4, "moe_intermediate_size": 96, **_LATENT}
_DEEPSEEK |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
_LLAMA4 = {**GROUPED, **_LOCAL, "intermediate_size_mlp": 128, "head_dim": 16, "num_experts_per_tok": 1}
_LLAMA4 |= {"interleave_moe_layer_step": 1}
_DBRX = {"vocab_size": 128, "d_model": 64, "n_heads": 4, "n_layers": 1, "max_seq_len": 64}
_DBRX |= {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}}
_DBRX |= {"ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}}


def _moe(kind, config, *, inputs=tokens, **more):
    return Entry(kind, "MoE", config, inputs, **more)


EXPERTS = (
    _moe("MixtralForCausalLM", {**GROUPED, **_LOCAL, "intermediate_size": 96}, daily=True),
    _moe("Qwen2MoeForCausalLM", {**GROUPED, **_SHARED}),
    _moe("Qwen3MoeForCausalLM", {**GROUPED, **_ROUTED, "moe_intermediate_size": 64, "head_dim": 16}, daily=True),
    _moe("PhimoeForCausalLM", {**GROUPED, **_LOCAL}),
    _moe("GraniteMoeForCausalLM", {**GROUPED, **_LOCAL}),
    _moe("OlmoeForCausalLM", {**GROUPED, **_ROUTED}),
    _moe("DeepseekV2ForCausalLM", {**_DEEPSEEK, "topk_method": "greedy"}),
    _moe("DeepseekV3ForCausalLM", {**_DEEPSEEK, "n_group": 2, "topk_group": 1}, daily=True),
    _moe("GptOssForCausalLM", {**GROUPED, **_LOCAL, "head_dim": 16, "sliding_window": 8}, daily=True),
    _moe("Llama4ForCausalLM", _LLAMA4),
    _moe("JetMoeForCausalLM", {**GROUPED, **_LOCAL, "intermediate_size": 64, "kv_channels": 16}),
    _moe("DbrxForCausalLM", _DBRX),
    _moe("HunYuanMoEV1ForCausalLM", {**GROUPED, "num_experts": 4, "moe_topk": [2], "head_dim": 16}),
    _moe("Glm4MoeForCausalLM", {**{k: v for k, v in _DEEPSEEK.items() if k not in _LATENT}, "head_dim": 16}),
    _moe(
        "Ernie4_5_MoeForCausalLM",
        {
            **GROUPED,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 64,
            "moe_layer_start_index": 0,
            "moe_layer_interval": 1,
        },
    ),
    _moe("MiniMaxForCausalLM", {**GROUPED, **_LOCAL, "head_dim": 16, "layer_types": ["full_attention"]}),
    _moe(
        "Lfm2MoeForCausalLM",
        {**GROUPED, **_ROUTED, "moe_intermediate_size": 64, "num_dense_layers": 0, "layer_types": ["full_attention"]},
    ),
)
