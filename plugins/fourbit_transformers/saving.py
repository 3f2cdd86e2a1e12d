"""The tensors of a 4-bit model as its files have them: bitsandbytes' layout, under the names that the Hub uses."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from fourbit.nn import PackedModule
from fourbit.nn.frozen import plain
from fourbit.nn.walk import describe_model
from fourbit.plans.rules import left_modules
from fourbit_transformers.config import FourbitConfig
from fourbit_transformers.rows import Packed, Rows


def describe(model: nn.Module, config: FourbitConfig) -> None:
    """Have the configuration say what of the model is in 16 bit."""
    layers = describe_model(model)
    config.left_modules = left_modules(layers, [layer for layer in layers if layer.note == "4-bit already"])
    config.dtype = model.dtype  # type: ignore[assignment]


def state_dict(model: Any, conversions: list[Any] | None) -> dict[str, Tensor]:
    """All tensors by their names in files.

    Args:
        model: whose offloaded weights are read.
        conversions: by which transformers read it; None: what it would write such a model with.
    """
    packed = packed_weights(model)
    others = _other_tensors(model)
    rows = Rows()
    stand_ins = {name: rows.stand_in(weight) for name, weight in packed.items()}
    names = list(stand_ins)
    kept: dict[str, Packed] = {}
    while True:
        try:
            moved = _as_in_files(model, {**others, **stand_ins}, conversions)
        except (RuntimeError, ValueError, IndexError, KeyError, NotImplementedError):
            if not stand_ins:
                raise
            # an operation of transformers that no stand-in gets through: they keep the model's own names
            kept |= {name: packed[name] for name in stand_ins}
            stand_ins = {}
            continue
        found = {name: rows.weight(t) if Rows.is_stand_in(t) else t for name, t in moved.items()}
        lost = [moved[name] for name, weight in found.items() if weight is None]
        if not lost:
            break
        for name in {names[i] for tensor in lost for i in rows.sources(tensor)}:
            kept[name] = packed[name]
            del stand_ins[name]
    result: dict[str, Tensor] = {}
    for name, value in {**found, **kept}.items():
        if isinstance(value, Packed):
            codes, state = value
            result[name] = codes.reshape(-1, 1)
            for part, tensor in state.to_state_dict(f"{name}.").items():
                # the experts of a stack share their tables, which files do not
                result[part] = tensor.clone() if part.endswith("quant_map") else tensor
        elif value is not None:
            result[name] = value
    return result


def packed_weights(model: nn.Module) -> dict[str, Packed]:
    """Every packed weight by the name of the parameter whose place it has; shared ones under each."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedModule):
            full = name if module.replaces is nn.Parameter else f"{name}.weight"
            with _at_hand(module):
                codes, state = module.quant_state()
                if codes.is_meta:
                    raise ValueError(f"{full} has no values: it is on the meta device")
                found[full] = Packed(*_copied(codes, state)) if _is_offloaded(module) else Packed(plain(codes), state)
    return found


def _other_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that is not part of a packed weight; of packed modules the bias."""
    storage: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedModule):
            own = {*module._parameters, *module._buffers} - {"bias"}
            storage |= {f"{name}.{each}" for each in own}
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name not in storage:
            if hasattr(tensor, "full_tensor"):  # a DTensor, which all processes gather
                tensor = tensor.full_tensor()
            found[name] = tensor if tensor.device.type != "meta" else _offloaded(model, name)
    return found


def _as_in_files(model: Any, tensors: Mapping[str, Tensor], conversions: list[Any] | None) -> dict[str, Tensor]:
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    before = model.__dict__.get("_weight_conversions")
    tensors = remove_tied_weights_from_state_dict(dict(tensors), model)
    try:
        model._weight_conversions = conversions
        return revert_weight_conversion(model, tensors)  # type: ignore[no-any-return]
    finally:
        model._weight_conversions = before


def _is_offloaded(module: nn.Module) -> bool:
    return any(t.device.type == "meta" for t in module._parameters.values() if t is not None)


@contextmanager
def _at_hand(module: nn.Module) -> Any:
    """Inside, the tensors of a module that accelerate has offloaded are on the CPU."""
    if not _is_offloaded(module) or not hasattr(module, "_hf_hook"):
        yield
        return
    from accelerate.utils import align_module_device  # type: ignore[import-untyped]

    buffers = dict(module._buffers)  # which stay where the module computes
    module._buffers.update({name: None if tensor is None else tensor.cpu() for name, tensor in buffers.items()})
    try:
        with align_module_device(module, torch.device("cpu")):
            yield
    finally:
        module._buffers.update(buffers)


def _offloaded(model: nn.Module, name: str) -> Tensor:
    """The value of a tensor that accelerate has offloaded; one that has none stays on the meta device."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    with _at_hand(owner):
        found = owner._parameters.get(leaf, owner._buffers.get(leaf))
        assert found is not None
        return found.detach().clone()


def _copied(codes: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Out of the reach of the hook that takes them away again."""
    from dataclasses import replace

    tensors = {name: t.clone() for name, t in state._tensors().items() if t is not None}
    return codes.clone(), replace(state, **tensors)
