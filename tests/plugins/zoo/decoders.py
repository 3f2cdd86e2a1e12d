"""Dense decoders."""

from __future__ import annotations

import torch

from tests.plugins.zoo.entry import GROUPED, SMALL, Entry, tokens

_GPT = {"vocab_size": 128, "n_embd": 64, "n_layer": 1, "n_head": 4, "bos_token_id": None, "eos_token_id": None}
_OPT = {"vocab_size": 128, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
_OPT |= {"word_embed_proj_dim": 64, "max_position_embeddings": 64, "pad_token_id": 1}
_UNGATED = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
_DECISION = {"state_dim": 8, "act_dim": 8, "hidden_size": 64, "n_layer": 1, "n_head": 4}


def _decoder(kind, config, *, inputs=tokens, **more):
    return Entry(kind, "decoder", config, inputs, **more)


def _episode():
    steps = {name: torch.randn(1, 4, size) for name, size in (("states", 8), ("actions", 8), ("rewards", 1))}
    return {**steps, "returns_to_go": torch.randn(1, 4, 1), "timesteps": torch.arange(4)[None]}


DECODERS = (
    _decoder("LlamaForCausalLM", GROUPED, daily=True),
    _decoder("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}, variant="tied"),
    _decoder("LlamaModel", GROUPED, output="last_hidden_state"),
    _decoder("MistralForCausalLM", {**GROUPED, "intermediate_size": 96, "sliding_window": 8}),
    _decoder("Qwen2ForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    _decoder("Qwen3ForCausalLM", {**GROUPED, "head_dim": 32}),
    _decoder("Gemma2ForCausalLM", {**GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16}, daily=True),
    _decoder("Gemma3ForCausalLM", {**GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16}),
    _decoder(
        "Gemma4ForCausalLM",
        {
            **GROUPED,
            "num_hidden_layers": 2,
            "head_dim": 16,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 128,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    _decoder("PhiForCausalLM", SMALL),
    _decoder("Phi3ForCausalLM", {**GROUPED, "intermediate_size": 96}),
    _decoder("GPT2LMHeadModel", _GPT, daily=True),
    _decoder("GPT2ForSequenceClassification", {**_GPT, "pad_token_id": 0}),
    _decoder("OpenAIGPTLMHeadModel", {"vocab_size": 128, "n_embd": 64, "n_layer": 1, "n_head": 4}),
    _decoder("DecisionTransformerModel", _DECISION, inputs=_episode, output="state_preds"),
    _decoder("GPTNeoXForCausalLM", SMALL, daily=True),
    _decoder("GPTJForCausalLM", {**_GPT, "rotary_dim": 8}),
    _decoder("GPTBigCodeForCausalLM", _GPT),
    _decoder("CodeGenForCausalLM", {**_GPT, "rotary_dim": 8}),
    _decoder("OPTForCausalLM", _OPT),
    _decoder("BloomForCausalLM", {**_GPT, "hidden_size": 64}),
    _decoder("FalconForCausalLM", {**_UNGATED, "alibi": False}, daily=True),
    _decoder("StableLmForCausalLM", GROUPED),
    _decoder("Starcoder2ForCausalLM", GROUPED),
    _decoder("Olmo2ForCausalLM", GROUPED),
    _decoder("Cohere2ForCausalLM", GROUPED),
    _decoder("GraniteForCausalLM", GROUPED),
    _decoder("Glm4ForCausalLM", {**GROUPED, "head_dim": 16}),
    _decoder("SmolLM3ForCausalLM", GROUPED),
    _decoder("NemotronForCausalLM", GROUPED),
    _decoder("Ernie4_5ForCausalLM", {**GROUPED, "head_dim": 16}),
    _decoder("MptForCausalLM", {"vocab_size": 128, "d_model": 64, "n_layers": 1, "n_heads": 4, "max_seq_len": 64}),
)
