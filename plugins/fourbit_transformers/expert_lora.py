"""peft's LoRA on stacked experts in 4 bits: `LoraConfig(target_parameters=["mlp.experts.gate_up_proj", …])`.

peft looks for parameters of that name, and a 4-bit stack is a module with parameters of its own. The tuner here finds
the stacks as well, and wraps them in a ParamWrapper that adds the update beside the 4-bit product, as two grouped
low-rank products. All else is peft's own: initialization, names and files of adapters, merging, several adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftType
from peft.tuners import lora
from torch import nn

from fourbit.nn import ExpertWeights4bit
from fourbit_transformers.expert_forward import IMPLEMENTATION, AdaptedExperts, implementation


class ParamWrapper(lora.ParamWrapper):  # peft knows wrappers by the name of their class
    """peft's wrapper of one parameter, for a stack of experts in 4 bits."""

    def stack(self) -> ExpertWeights4bit | None:
        """The stack; None if it has been dequantized since."""
        found = self.get_base_layer()._modules.get(self.parameter_name)
        return found if isinstance(found, ExpertWeights4bit) else None

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """Inside, the module that owns the stack computes with the adapters' updates."""
        stack = self.stack()
        if stack is None:
            with super()._activate_lora(active_adapters):
                yield
            return
        adapters = [name for name in active_adapters if name in self.lora_A]
        owner = self.get_base_layer()
        if adapters:  # what an instance has in __dict__ is found before its submodules
            owner.__dict__[self.parameter_name] = self._adapted(stack, owner, adapters)
        try:
            yield
        finally:
            owner.__dict__.pop(self.parameter_name, None)

    def _adapted(self, stack: ExpertWeights4bit, owner: nn.Module, adapters: list[str]) -> Any:
        peft: Any = super()
        if implementation(owner) == IMPLEMENTATION and hasattr(self, "get_delta_factors"):  # since peft 0.21
            return AdaptedExperts(stack, [peft.get_delta_factors(name) for name in adapters])
        weight = stack.weight.read()  # a loop of the model's own reads it as it likes
        for name in adapters:
            weight = weight + peft.get_delta_weight(name)
        return weight


class LoraModel(lora.LoraModel):
    """peft's LoRA, which finds stacks of experts in 4 bits by `target_parameters`."""

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        with _shown_as_parameters(model):
            found: list[str] = super()._inject_parameters(peft_config, model, adapter_name, low_cpu_mem_usage)
        return found

    @staticmethod
    def _create_new_module(*arguments: Any, **more: Any) -> nn.Module:
        create: Any = lora.LoraModel._create_new_module
        new: nn.Module = create(*arguments, **more)
        adapt(new)
        return new


def register() -> None:
    """Put the tuner into peft's table, where peft's own is."""
    if PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is lora.LoraModel:
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = LoraModel


def adapt(module: Any) -> None:
    """Make peft's own ParamWrapper one of these where what it wraps is a stack in 4 bits by now."""
    if type(module) is lora.ParamWrapper:
        owner = module.get_base_layer()
        if isinstance(owner._modules.get(module.parameter_name), ExpertWeights4bit):
            module.__class__ = ParamWrapper


@contextmanager
def _shown_as_parameters(model: nn.Module) -> Iterator[None]:
    """Inside, owners of stacks in 4 bits have these among their parameters, as if they were in 16 bit."""
    with ExitStack() as undo:
        for module in model.modules():
            stacks = {n: c for n, c in module._modules.items() if isinstance(c, ExpertWeights4bit)}
            if not stacks:
                continue
            before = dict(module._parameters)
            undo.callback(_replace, module._parameters, before)
            shown: dict[str, Any] = {**{name: stack.weight for name, stack in stacks.items()}, **before}
            # wrappers are nested in this order, and adapters' files tell them apart by it: down_proj comes last
            _replace(module._parameters, dict(sorted(shown.items(), key=lambda item: "down" in item[0])))
        yield


def _replace(table: dict[str, Any], entries: dict[str, Any]) -> None:
    table.clear()
    table.update(entries)
