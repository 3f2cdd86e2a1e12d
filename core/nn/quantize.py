"""quantize_model: put 4-bit modules in place of a model's linear layers and stacked expert weights."""

from __future__ import annotations

from torch import nn

from fourbit.config import QuantConfig
from fourbit.functional import require_finite
from fourbit.nn.experts import ExpertWeights4bit
from fourbit.nn.linear import Linear4bit
from fourbit.plans import QuantPlan, plan


class LargeTensorError(ValueError):
    """`quantize_model(strict=True)`: a large tensor would stay in 16 bit though nobody chose so."""


def quantize_model(model: nn.Module, config: QuantConfig | None = None, *, strict: bool = False) -> nn.Module:
    """Quantize a model in place, as `fourbit.plan(model, config)` says; returns it.

    Every weight is looked through first, so that nothing has changed when it raises:

        NonFiniteError: a weight has NaN or Inf; with its name and the first offending index.
        LargeTensorError: with `strict`, a tensor of 2 MB or more would stay in 16 bit and neither
            `config.skip_modules` nor one of the standing rules (embedding, output head, router) says so.

    A model on the meta device gets empty 4-bit modules, to be filled by `load_state_dict(assign=True)`.
    """
    config = config or QuantConfig()
    steps = plan(model, config)
    if strict and steps.large_left:
        listing = "".join(f"\n  {t.name} {list(t.shape)}: {t.rule}" for t in steps.large_left)
        raise LargeTensorError(
            f"{len(steps.large_left)} large tensor(s) would stay in 16 bit; name their modules in skip_modules if that"
            f" is meant:{listing}"
        )
    for step in steps.quantized:
        weight = model.get_parameter(step.name)
        if weight.device.type != "meta":
            require_finite(weight, step.name)
    apply_plan(model, steps)
    return model


def apply_plan(model: nn.Module, steps: QuantPlan) -> None:
    """Swap the modules of a plan, one at a time, without looking for non-finite values first."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, attribute))
    for step in steps.quantized:
        owner = model.get_submodule(step.module)
        if step.kind == "linear":
            assert isinstance(owner, nn.Linear)
            if owner is model:
                raise ValueError("the model is itself an nn.Linear: use fourbit.nn.Linear4bit.from_linear")
            new = Linear4bit.from_linear(owner, steps.config, step.name)
            for parent, attribute in places[id(owner)]:  # a shared module has several
                setattr(parent, attribute, new)
        else:
            leaf = step.name.rsplit(".", 1)[-1]
            weight = owner._parameters.pop(leaf)
            assert weight is not None
            owner.register_module(leaf, ExpertWeights4bit.from_parameter(weight, steps.config, step.name))
            loop_over_experts(owner)


def loop_over_experts(owner: nn.Module) -> None:
    """Have transformers' expert modules loop over the experts: other ways need all of them in 16 bit at once."""
    model_config = getattr(owner, "config", None)
    if getattr(model_config, "_experts_implementation", None) is not None:
        model_config._experts_implementation = "eager"  # type: ignore[union-attr]
