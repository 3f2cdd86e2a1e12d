"""LoftQ: adapters that begin with what the quantization loses, instead of with zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fourbit.config import QuantConfig
from fourbit.nn import Linear4bit
from fourbit.nn.quantize import quantize_model


def quantize_loftq(
    model: nn.Module, config: QuantConfig | None = None, *, iterations: int = 1, adapter: str = "default"
) -> nn.Module:
    """Quantize a 16-bit peft model in place, and begin its LoRA adapters with the error, after LoftQ (2310.08659).

    Each adapted linear layer has W ≈ Q + s·B·A afterwards: B·A is the best approximation, of the adapter's rank r, to
    W - Q; with more `iterations` Q is quantized anew of W - s·B·A, and B·A found anew. All other layers are quantized
    as `fourbit.quantize_model` does it. peft's own `init_lora_weights="loftq"` wants a GPU, bitsandbytes and a model
    in 16 bit, and finds no error in one that is quantized already.

    Args:
        model: from `peft.get_peft_model` on a model in 16 bit. What its adapter holds is overwritten.
        config: default QuantConfig().
        iterations: of quantizing and approximating; 5 in the paper.
        adapter: its name.

    Raises ValueError, before anything is changed, for an adapter that adapts no linear layer which `config` would have
    quantized, for one with DoRA, whose magnitudes are of other weights, and what `quantize_model` raises.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be 1 or more, got {iterations}")
    layers = {name: layer for name, layer in model.named_modules() if _is_adapted(layer, adapter)}
    with_dora = next((name for name, layer in layers.items() if layer.use_dora.get(adapter)), None)
    if with_dora is not None:
        raise ValueError(f"{with_dora}: an adapter with DoRA has the magnitudes of weights that it began with")
    if not layers:
        raise ValueError(f"the adapter {adapter!r} adapts no linear layer that is in 16 bit: nothing to do for LoftQ")
    weights = {name: layer.base_layer.weight.detach() for name, layer in layers.items()}
    quantize_model(model, config)
    for name, layer in layers.items():
        weight, base = weights.pop(name), layer.base_layer
        if isinstance(base, Linear4bit):  # config may leave some in 16 bit, which lose nothing
            _begin(layer, base, weight.float(), iterations, adapter)
    return model


def _is_adapted(layer: Any, adapter: str) -> bool:
    """Whether it is peft's LoRA of an nn.Linear, whose adapter has that name."""
    base, adapters = getattr(layer, "base_layer", None), getattr(layer, "lora_A", {})
    return type(base) is nn.Linear and adapter in adapters and hasattr(layer, "lora_B")


@torch.no_grad()
def _begin(layer: Any, base: Linear4bit, weight: Tensor, iterations: int, adapter: str) -> None:
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    left, right = _approximation(weight - base.dequantize(torch.float32), len(a))
    for _ in range(iterations - 1):
        base.store(weight - left @ right)
        left, right = _approximation(weight - base.dequantize(torch.float32), len(a))
    share = layer.scaling[adapter] ** 0.5
    a.copy_(right / share)
    b.copy_(left / share)


def _approximation(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors [out, rank] and [rank, in] of the best one."""
    u, s, v = torch.linalg.svd(error, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]
