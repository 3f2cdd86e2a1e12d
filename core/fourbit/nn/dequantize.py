"""dequantize_model: put 16-bit modules and parameters back in place of a model's 4-bit ones."""

from __future__ import annotations

import sys
from contextlib import ExitStack

import torch
from torch import nn

from fourbit import checks, plugins
from fourbit.nn.packed import PackedModule

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)
"""What a module holds of the hooks that were registered on it."""


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Put a 16-bit module or parameter in place of each 4-bit one, in place, and return the model.

    `quantize_model`'s counterpart: on a whole model, and inside the wrappers that adapters put around its layers, so
    that merging them rounds to 16 bits and not to 4.

    Args:
        model: what it has of 4-bit modules may be anywhere in it; one without any comes back as it is.
        dtype: of the weights, and of the biases beside them; None: each weight's logical dtype.

    The weights are exactly what the 4-bit ones stood for (`module.dequantize(dtype)`), on the same device, and frozen
    as those are: `requires_grad_(True)` to train them. Layers that share one 4-bit weight share one afterwards, and
    hooks stay. All or nothing: everything is made before the first module is replaced, so that for a while both are
    there.

    Raises ValueError for a model that is a 4-bit module itself, for one that accelerate has offloaded and for another
    dtype than the four floating-point ones, and NotImplementedError for a PackedModule that does not say how it is
    `restored`.
    """
    if isinstance(model, PackedModule):
        raise ValueError(f"the model is itself a {type(model).__name__}: use its dequantize(), or restored()")
    if dtype is not None:
        checks.compute_dtype("dequantize_model", dtype)
    places = [
        (parent, attribute, child)
        for parent in model.modules()
        for attribute, child in parent._modules.items()
        if isinstance(child, PackedModule)
    ]
    names = {id(module): name for name, module in model.named_modules()}
    weights: dict[int, nn.Parameter] = {}
    made: dict[int, nn.Module | nn.Parameter] = {}
    for _, _, old in places:
        if id(old) in made:
            continue
        if old.qweight.is_meta and getattr(old, "_hf_hook", None) is not None:
            raise ValueError(
                f"{names[id(old)]} is offloaded by accelerate: load the model without offloading to dequantize it"
            )
        storage = id(old._parameters["qweight"])
        if storage not in weights:
            weight = old.dequantize(dtype)
            weights[storage] = nn.Parameter(weight.T.contiguous() if old.transposed else weight, requires_grad=False)
        made[id(old)] = old.restored(weights[storage])
    with ExitStack() as undo:
        for parent, attribute, old in places:
            new = made[id(old)]
            old.leave(parent, attribute, new, undo)
            if isinstance(new, nn.Module):
                new.train(old.training)
                _keep_hooks(old, new)
        undo.pop_all()
    if places:
        plugins.tell("fourbit_model_dequantized", model=model)
    return model


def _keep_hooks(old: nn.Module, new: nn.Module) -> None:
    for attribute in _HOOKS:  # the very dicts: whoever registered a hook can still remove it
        setattr(new, attribute, getattr(old, attribute))
    hook = getattr(old, "_hf_hook", None)  # accelerate's, which moves inputs to the device of a dispatched module
    if hook is not None and getattr(new, "_hf_hook", None) is not hook:
        sys.modules["accelerate.hooks"].add_hook_to_module(new, hook)
