"""Tiny models for vLLM, and what transformers with fourbit answers on a folder of theirs."""

from __future__ import annotations

from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

import fourbit
from tests.plugins.expert_models import randomize

PROMPTS = [[5, 17, 99, 3], [200, 1, 44, 45, 46, 47, 48]]
NEW_TOKENS = 12

SIZES = {
    **{"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256},
    **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False},
}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ODD = {"hidden_size": 144, "intermediate_size": 176}
"""Blocks of 64 and of 32 run across rows, and across the borders of ranks."""
DIVIDED = {"hidden_size": 192, "intermediate_size": 192}
"""Half a row is no whole number of blocks of 64, but of 32."""


def some(names: Iterable[str], quick: Container[str]) -> pytest.MarkDecorator:
    """Parameters of a test, `name`; those that are not quick are long."""
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=() if name in quick else pytest.mark.long) for name in names]
    )


def llama(**sizes: Any) -> torch.nn.Module:
    return _made(T.LlamaForCausalLM, T.LlamaConfig(**{**SIZES, **sizes}))


def qwen3_moe(**sizes: Any) -> torch.nn.Module:
    return _made(T.Qwen3MoeForCausalLM, T.Qwen3MoeConfig(**{**SIZES, **ROUTED, **sizes}))


def mixtral(**sizes: Any) -> torch.nn.Module:
    config = T.MixtralConfig(**{**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, **sizes})
    return _made(T.MixtralForCausalLM, config)


def phi3(**sizes: Any) -> torch.nn.Module:
    """Its folders hold q, k and v in one tensor, and gate and up."""
    config = T.Phi3Config(**{**SIZES, **sizes})
    return _made(T.Phi3ForCausalLM, config)


def _made(kind: type, config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = randomize(kind(config)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data -= 1  # which is for the norms
    return model


def written(model: torch.nn.Module, folder: Path, **quant: Any) -> Path:
    """A 4-bit folder, by save_pretrained."""
    fourbit.quantize_model(model, fourbit.QuantConfig(**quant)).save_pretrained(folder)
    return folder


@torch.no_grad()
def answers(model: Any, prompts: list[list[int]] = PROMPTS, count: int = NEW_TOKENS) -> list[list[int]]:
    """Greedy tokens of a model of transformers."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        found.append(made[0, len(prompt) :].tolist())
    return found


def reference(folder: Path) -> list[list[int]]:
    """Greedy tokens of transformers with fourbit's modules on a folder, ours or bitsandbytes'."""
    from fourbit_transformers import take_over_bitsandbytes

    take_over_bitsandbytes()
    try:
        model = T.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return answers(model)
    finally:
        take_over_bitsandbytes(False)
