"""State-space models and other recurrences, alone and beside attention."""

from __future__ import annotations

from tests.plugins.zoo.entry import GROUPED, SMALL, Entry, tokens

_MAMBA = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 1, "state_size": 16}
_SELECTIVE = {**_MAMBA, "time_step_rank": 64}
_MAMBA2 = {**_MAMBA, "num_heads": 8, "head_dim": 16, "n_groups": 1, "bos_token_id": None, "eos_token_id": None}
_NEMOTRON_H = {**GROUPED, "num_hidden_layers": 4, "hybrid_override_pattern": "M*E-", "head_dim": 16}
_NEMOTRON_H |= {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 16, "n_routed_experts": 4}
_NEMOTRON_H |= {"moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64, "num_experts_per_tok": 2}
_JAMBA = {**GROUPED, "num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4}
_JAMBA |= {
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "use_mamba_kernels": False,
    "mamba_d_state": 16,
    "mamba_dt_rank": 64,
}
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "head_dim": 16}
_DELTA |= {"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
_SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_SPARSE |= {"shared_expert_intermediate_size": 64}
_GRIFFIN = {**SMALL, "num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 8}
_FALCON_H1 = {**GROUPED, "mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1}
_BAMBA = {**GROUPED, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "num_hidden_layers": 2}


def _recurrent(kind, config, *, inputs=tokens, **more):
    return Entry(kind, "state-space", config, inputs, **more)


RECURRENT = (
    _recurrent("MambaForCausalLM", _SELECTIVE, reads="dt_proj.weight"),
    _recurrent("Mamba2ForCausalLM", _MAMBA2, daily=True),
    _recurrent("FalconMambaForCausalLM", _SELECTIVE),
    _recurrent("NemotronHForCausalLM", _NEMOTRON_H, daily=True),
    _recurrent("JambaForCausalLM", _JAMBA),
    _recurrent("RecurrentGemmaForCausalLM", _GRIFFIN),
    _recurrent("Qwen3NextForCausalLM", {**GROUPED, **_DELTA, **_SPARSE}),
    _recurrent("FalconH1ForCausalLM", {**_FALCON_H1, "mamba_d_state": 16}),
    _recurrent("BambaForCausalLM", {**_BAMBA, "attn_layer_indices": [1], "mamba_d_state": 16}),
    _recurrent("Lfm2ForCausalLM", {**GROUPED, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}),
    _recurrent("RwkvForCausalLM", {**_MAMBA, "num_hidden_layers": 2, "attention_hidden_size": 64, "rescale_every": 0}),
    _recurrent("Qwen3_5MoeForCausalLM", {**GROUPED, **_DELTA, **_SPARSE}),
)
