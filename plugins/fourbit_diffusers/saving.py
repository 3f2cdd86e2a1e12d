"""A model's state dict in the bitsandbytes layout: what diffusers writes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fourbit.nn.packed import PackedModule
from fourbit.nn.storage import STORAGE

_ALIGN = 16
"""Parts begin at multiples of this in the block that holds them."""


def in_bitsandbytes_layout(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state_dict` of `model` with, for each 4-bit weight, the packed weight and its state.

    Raises ValueError for a model with adapters, whose names nobody could read back, and for one that is offloaded.
    """
    found: dict[str, tuple[str, PackedModule]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if hasattr(type(module), "adapter_layer_names"):
            raise ValueError(
                f"{name} has an adapter: save that with save_lora_adapter(), and the model after unload_lora() or"
                " delete_adapters(), or dequantize(), fuse_lora() and save in 16 bit"
            )
        if isinstance(module, PackedModule):
            weight = f"{name}.weight" if module.replaces is not nn.Parameter else name
            found |= {f"{name}.{each}": (weight, module) for each in STORAGE}
    out: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is offloaded, and its values are not here: load the model without offloading")
        if name not in found:
            out[name] = tensor
            continue
        weight, module = found[name]
        if weight not in out:
            out |= _together(_parts(weight, module))
    return out


def _parts(weight: str, module: PackedModule) -> dict[str, Tensor]:
    packed, state = module.quant_state()
    return {weight: packed.reshape(-1, 1), **state.to_state_dict(weight + ".")}


def _together(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of `parts` in one block of memory: then they go into the same file, whatever its size.

    diffusers divides a state dict among files tensor by tensor, and its own loader of bitsandbytes wants a weight and
    its state in one file. Tensors that share a storage stay together.
    """
    starts, end = [], 0
    for tensor in parts.values():
        starts.append(end)
        end += -(-tensor.nbytes // _ALIGN) * _ALIGN
    block = torch.empty(end, dtype=torch.uint8)
    made = {}
    for (name, tensor), start in zip(parts.items(), starts, strict=True):
        made[name] = block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        made[name].copy_(tensor)
    return made
