"""A model's stacked experts in 4 bits: which implementation they run on, and adapters that were on them before."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fourbit.nn import ExpertWeights4bit
from fourbit_transformers import expert_peft
from fourbit_transformers.expert_forward import IMPLEMENTATION, implementation


def use_fourbit_experts(model: nn.Module) -> nn.Module:
    """Have the modules of `model` that hold stacked experts in 4 bits run on the implementation "fourbit".

    Those for which "eager" was asked keep it, and modules with loops of their own read their weights through views.
    Returns the model.
    """
    holders = [m for m in model.modules() if any(isinstance(child, ExpertWeights4bit) for child in m.children())]
    others = (None, "eager", IMPLEMENTATION)
    if any(implementation(m) not in others for m in holders):
        outermost = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
        if outermost is not None:
            outermost.set_experts_implementation(IMPLEMENTATION)
    for module in holders:  # what that does not reach
        if implementation(module) not in others:
            config: Any = module.config
            config._experts_implementation = IMPLEMENTATION
    if holders:
        expert_peft.adapt(model)
    return model
