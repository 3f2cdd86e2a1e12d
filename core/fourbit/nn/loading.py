"""What a state dict has to hold before a module takes anything from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.nn.frozen import FrozenCodes, FrozenScales, FrozenTensor

_ORDINARY = (Tensor, nn.Parameter, FrozenTensor, FrozenCodes, FrozenScales)


def entry_errors(
    own: Mapping[str, Tensor],
    storage: Collection[str],
    table: Tensor,
    quant_type: str,
    state_dict: Mapping[str, Any],
    prefix: str,
    assign: bool,
) -> list[str]:
    """Everything that keeps `state_dict` from being loaded into a module; empty if all of it, or none, can be.

    Args:
        own: the module's parameters and persistent buffers, by name.
        storage: those names among them that make up the 4-bit weight, which belong together.
        table: the bits of the codebook of `quant_type`.
        state_dict, prefix, assign: as `nn.Module.load_state_dict` has them.
    """
    found = {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
    present = [name for name in storage if name in found]
    if present and len(present) < len(storage):
        return [f"{prefix}{name} is missing beside {prefix}{present[0]}" for name in storage if name not in found]
    errors = [
        f"{prefix}{name}: {error}"
        for name, value in found.items()
        if (error := _entry_error(own[name], value, name in storage, assign))
    ]
    if errors or not found:
        return errors
    devices = {str(value.device): name for name, value in found.items()}
    if assign and len(devices) > 1:
        where = " and ".join(f"{prefix}{name} on {device}" for device, name in devices.items())
        return [f"{where}: a weight that is assigned must have its parts on one device"]
    code = found.get("codebook")
    if isinstance(code, Tensor) and hasattr(code, "full_tensor"):  # a DTensor
        code = code.full_tensor()
    if code is not None and not code.is_meta and not torch.equal(code.cpu(), table):
        return [f"{prefix}codebook: the values are not those of {quant_type!r}, which this module holds"]
    return []


def _entry_error(own: Tensor, value: Any, bits: bool, assign: bool) -> str | None:
    if not isinstance(value, Tensor):
        return f"want a tensor, got {type(value).__name__}"
    if bits and value.dtype != own.dtype:
        return f"want {own.dtype}, got {value.dtype} (is the double quantization another?)"
    if own.is_floating_point() and not value.is_floating_point():
        return f"want a floating-point tensor, got {value.dtype}"
    if value.is_nested or value.layout is not torch.strided:
        return f"want a dense tensor, got a {'nested' if value.is_nested else value.layout} one"
    if value.shape != own.shape:
        return f"want shape {list(own.shape)}, got {list(value.shape)} (another blocksize?)"
    if value.is_meta and not own.is_meta and not assign:
        return "a tensor on the meta device has no values to copy"
    if not assign and (type(value) not in _ORDINARY or type(own) not in _ORDINARY):
        try:  # DTensors and others: whether they can be copied, only copying tells
            with torch.no_grad():
                torch.empty_like(own).copy_(value)
        except Exception as error:
            return f"a {type(value).__name__} cannot be copied into a {type(own).__name__}: {error}"
    return None
