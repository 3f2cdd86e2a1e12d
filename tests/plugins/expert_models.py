"""Tiny mixtures of experts of transformers: whole models, and modules of stacked experts of every kind alone."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
import transformers as T
from torch import nn

from fourbit.nn import ExpertWeights4bit, Linear4bit

SIZES = {
    **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
    **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    **{"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16},
    **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4},
}
MODELS = {
    "qwen3-moe": lambda: T.Qwen3MoeForCausalLM(
        T.Qwen3MoeConfig(**SIZES, **ROUTED, moe_intermediate_size=32, head_dim=16)
    ),
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**SIZES, **LOCAL)),
    "gpt-oss": lambda: T.GptOssForCausalLM(T.GptOssConfig(**SIZES, **LOCAL, head_dim=16)),
    "deepseek-v3": lambda: T.DeepseekV3ForCausalLM(T.DeepseekV3Config(**{**SIZES, **DEEPSEEK})),
    "olmoe": lambda: T.OlmoeForCausalLM(T.OlmoeConfig(**SIZES, **ROUTED)),
    "llama4": lambda: T.Llama4ForCausalLM(
        T.Llama4TextConfig(**SIZES, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=64, head_dim=16)
    ),
}
OWN_LOOPS = ("llama4",)
"""Those whose experts are no implementation of transformers' interface."""


def make(name: str) -> nn.Module:
    """One of MODELS in float32, in evaluation mode, its weights random but the same each time."""
    torch.manual_seed(0)
    return randomize(MODELS[name]()).eval()


def randomize(module: nn.Module) -> nn.Module:
    """Give every parameter a value: transformers leaves some of a new model uninitialized."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.1)
            if parameter.dim() == 1:
                parameter.add_(1)
    return module


MODULES = {
    "qwen3-moe": "qwen3_moe.Qwen3MoeExperts",
    "mixtral": "mixtral.MixtralExperts",
    "deepseek-v3": "deepseek_v3.DeepseekV3Experts",
    "olmoe": "olmoe.OlmoeExperts",
    "no gate": "nemotron_h.NemotronHExperts",
    "transposed": "aria.AriaExperts",
    "transposed, bias": "openai_privacy_filter.OpenAIPrivacyFilterExperts",
    "transposed, bias, interleaved gate": "gpt_oss.GptOssExperts",
    "norm after each expert": "muse_spark.MuseSparkExperts",
}


def experts(name: str, hidden: int = 64, intermediate: int = 32, count: int = 5) -> nn.Module:
    """One of MODULES with random weights; skips where this version of transformers has no such model."""
    folder, _, kind = MODULES[name].partition(".")
    try:
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    except ImportError:
        pytest.skip(f"transformers {T.__version__} has no {kind}")
    cls = getattr(module, kind, None)
    if cls is None:
        pytest.skip(f"transformers {T.__version__} has no {kind}")
    counts = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), count)
    config = SimpleNamespace(
        **counts,
        **{"hidden_size": hidden, "moe_hidden_size": hidden, "moe_latent_size": None},
        **{"intermediate_size": intermediate, "moe_intermediate_size": intermediate},
        **{"hidden_act": "silu", "mlp_hidden_act": "relu2", "swiglu_alpha": 1.7, "swiglu_limit": 7.0},
        **{"post_norm_eps": 1e-6, "_experts_implementation": "eager"},
    )
    torch.manual_seed(1)
    built = cls(config)
    if not hasattr(built, "is_transposed"):
        pytest.skip(f"{kind} of transformers {T.__version__} takes no experts implementation")
    return randomize(built)


def dense_twin(quantized: nn.Module, plain: nn.Module) -> nn.Module:
    """`plain` with each weight that is in 4 bits in `quantized` replaced by what it dequantizes to."""
    for name, module in quantized.named_modules():
        if isinstance(module, ExpertWeights4bit | Linear4bit):
            parameter = plain.get_parameter(name if isinstance(module, ExpertWeights4bit) else f"{name}.weight")
            parameter.data = module.dequantize()
    return plain
