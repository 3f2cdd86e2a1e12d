"""Registration of `expert_lora` with peft, once there is a model with stacked experts in 4 bits."""

from __future__ import annotations

from importlib.util import find_spec

from torch import nn


def adapt(model: nn.Module) -> None:
    """Have peft's LoRA find the stacked experts in 4 bits of `model`, also by adapters that are on it already.

    It imports peft, where that is installed, which takes a second or two: so only for such a model.
    """
    if find_spec("peft") is None:
        return
    try:
        from fourbit_transformers import expert_lora
    except ImportError:
        return  # a peft of before `target_parameters`
    expert_lora.register()
    for module in list(model.modules()):
        expert_lora.adapt(module)
