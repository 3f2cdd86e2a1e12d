"""Models with random weights, of the shapes of known ones: in bfloat16, and in 4 bits by fourbit and bitsandbytes.

All are there at once, so that they can take turns, and share what stays in 16 bit: embedding, head, norms, routers.
"""

from __future__ import annotations

import copy
import inspect
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched by name
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, Qwen3MoeConfig

import fourbit
from harness.weights import BLOCKSIZE

BF16, FOURBIT, BNB = "bf16", "fourbit", "bitsandbytes"

LLAMA_8B = {
    **{"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192},
}
QWEN3_30B_A3B = {
    **{"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32},
    **{"num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8},
    **{"moe_intermediate_size": 768, "max_position_embeddings": 8192},
}
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""What the argument of a model's forward is called."""


def llama(layers: int, **sizes: int) -> LlamaConfig:
    """Of Llama 3 8B's shape, in other sizes where they are given."""
    return LlamaConfig(**{**LLAMA_8B, **sizes}, num_hidden_layers=layers, tie_word_embeddings=False)


def qwen3_moe(layers: int, **sizes: int) -> Qwen3MoeConfig:
    """Of Qwen3-30B-A3B's shape, in other sizes where they are given."""
    return Qwen3MoeConfig(**{**QWEN3_30B_A3B, **sizes}, num_hidden_layers=layers, tie_word_embeddings=False)


def empty(config: PreTrainedConfig) -> nn.Module:
    """On the meta device, in bfloat16, with a configuration of its own."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16, attn_implementation="sdpa")


def ready(model: nn.Module, device: str) -> nn.Module:
    """With the rotary frequencies, which are computed and not loaded; frozen, for inference."""
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model.requires_grad_(False).eval()


def plain(config: PreTrainedConfig, device: str, seed: int = 0) -> nn.Module:
    """In bfloat16 with random weights; stacked experts run on torch's grouped product."""
    model = empty(config).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1)
        else:
            parameter.data.normal_(std=0.02, generator=generator)
    if hasattr(config, "num_experts"):
        model.set_experts_implementation("grouped_mm")
    return ready(model, device)


def twin(model: nn.Module, device: str) -> nn.Module:
    """Another model with the same parameters, not copies of them."""
    other = empty(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    return ready(other, device)


def with_fourbit(model: nn.Module, device: str, double: bool) -> nn.Module:
    """`model` in 4 bits, beside itself."""
    from fourbit_transformers.experts import use_fourbit_experts

    config = fourbit.QuantConfig(blocksize=BLOCKSIZE, double_quant=double)
    return use_fourbit_experts(fourbit.quantize_model(twin(model, device), config)).eval()


def with_bitsandbytes(model: nn.Module, device: str, double: bool, library: Any) -> nn.Module:
    """`model` in bitsandbytes' 4 bits (NF4), beside itself: all linear layers but the head."""
    other = twin(model, device)
    for parent in list(other.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(parent, name, _bitsandbytes_linear(child, device, double, library))
    other.is_loaded_in_4bit = True  # by which peft knows it
    return other.eval()


def _bitsandbytes_linear(linear: nn.Linear, device: str, double: bool, library: Any) -> nn.Module:
    how = {"compress_statistics": double, "quant_type": "nf4"}
    dtype, sizes = linear.weight.dtype, (linear.in_features, linear.out_features)
    layer = library.nn.Linear4bit(*sizes, bias=False, compute_dtype=dtype, device="meta", **how)
    weight = library.nn.Params4bit(
        linear.weight.detach().clone(),  # its own, since it quantizes in place
        requires_grad=False,
        blocksize=BLOCKSIZE,
        module=layer,
        **how,
    )
    layer.weight = weight.to(device)
    return layer


def contenders(
    config: PreTrainedConfig, device: str, library: Any = None, double: bool = False, seed: int = 0
) -> dict[str, nn.Module]:
    """One model in its forms; bitsandbytes' (`library`) only where it is there and can hold all of it."""
    first = plain(config, device, seed)
    found = {BF16: first, FOURBIT: with_fourbit(first, device, double)}
    if library is not None and not hasattr(config, "num_experts"):
        found[BNB] = with_bitsandbytes(first, device, double, library)
    return found


def tensors(model: nn.Module) -> list[Tensor]:
    """Everything that it holds, each once."""
    found = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "__dict__", {}).get("quant_state")  # bitsandbytes'
        if state is not None:
            nested = () if state.state2 is None else (state.state2.absmax,)
            found |= {id(tensor): tensor for tensor in (state.absmax, *nested)}
    return list(found.values())


def nbytes(model: nn.Module) -> int:
    """What `tensors` takes."""
    return sum(tensor.nbytes for tensor in tensors(model))


def versions() -> dict[str, str]:
    """Of the libraries that models are built with."""
    import peft
    import transformers

    return {"transformers": transformers.__version__, "peft": peft.__version__}
