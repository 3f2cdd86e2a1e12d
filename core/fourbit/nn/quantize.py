"""quantize_model: put 4-bit modules in place of a model's linear layers and stacked expert weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from fourbit.config import QuantConfig
from fourbit.functional import require_finite
from fourbit.nn.experts import ExpertWeights4bit
from fourbit.nn.linear import Linear4bit
from fourbit.nn.packed import PackedModule
from fourbit.plans import QuantPlan, plan


class LargeTensorError(ValueError):
    """`quantize_model(strict=True)`: a large tensor would stay in 16 bit though nobody chose so."""


def quantize_model(model: nn.Module, config: QuantConfig | None = None, *, strict: bool = False) -> nn.Module:
    """Quantize a model in place, as `fourbit.plan(model, config)` says; returns it.

    All or nothing: the new modules are all made before the first is put in its place, so that nothing has changed
    when it raises:

        NonFiniteError: a weight has NaN or Inf; with its name and the first offending index.
        LargeTensorError: with `strict`, a tensor of 2 MB or more would stay in 16 bit and neither
            `config.skip_modules` nor one of the standing rules (embedding, output head, router, adapter, what the
            model keeps in float32) says so.

    Layers that share one weight share one 4-bit weight afterwards. The 16-bit weights are freed at the end, so that
    for a while both are there. A model on the meta device gets empty 4-bit modules, to be filled by
    `load_state_dict(assign=True)`.
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
    """Swap the modules of a plan, without looking for non-finite values first.

    Layers that shared one weight share one storage afterwards. All or nothing: whatever raises, the model is as it
    was.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, attribute))
    made: dict[int, PackedModule] = {}
    swaps: list[tuple[nn.Module, str, PackedModule]] = []
    for step in steps.quantized:
        owner, leaf = model.get_submodule(step.module), step.name.rsplit(".", 1)[-1]
        weight = owner._parameters[leaf]
        assert weight is not None
        twin = made.get(id(weight))
        if isinstance(owner, nn.Linear):
            if owner is model:
                raise ValueError("the model is itself an nn.Linear: use fourbit.nn.Linear4bit.from_linear")
            linear = Linear4bit.from_linear(owner, steps.config, step.name) if twin is None else _tied(owner, twin)
            made.setdefault(id(weight), linear)
            swaps += [
                (parent, attribute, linear) for parent, attribute in places[id(owner)]
            ]  # a shared one has several
        else:
            experts = ExpertWeights4bit.from_parameter(weight, steps.config, step.name) if twin is None else twin
            made.setdefault(id(weight), experts)
            swaps.append((owner, leaf, experts))
    undo: list[Callable[[], object]] = []
    try:
        for parent, name, new in swaps:
            undo.append(partial(_restore, parent, dict(parent._modules), dict(parent._parameters)))
            parent._parameters.pop(name, None)
            parent._modules[name] = new
            if isinstance(new, ExpertWeights4bit):
                undo.append(loop_over_experts(parent))
    except BaseException:
        for step_back in reversed(undo):
            step_back()
        raise


def _tied(linear: nn.Linear, twin: PackedModule) -> Linear4bit:
    """The 4-bit module of a layer whose weight another layer has too: it shares that one's storage."""
    new = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        quant_type=twin.quant_type,
        blocksize=twin.blocksize,
        double_quant=twin.double_quant,
        compute_dtype=getattr(twin, "compute_dtype", None),
        dtype=twin.dtype,
        device="meta",
    )
    new._parameters.update({name: p for name, p in twin._parameters.items() if name != "bias"})
    new._buffers.update(twin._buffers)
    new.bias = linear.bias
    new.train(linear.training)
    return new


def _restore(parent: nn.Module, modules: dict[str, nn.Module | None], parameters: dict[str, Any]) -> None:
    """Give a module its children and parameters of before, in their order."""
    parent._modules.clear()
    parent._modules.update(modules)
    parent._parameters.clear()
    parent._parameters.update(parameters)


def loop_over_experts(owner: nn.Module) -> Callable[[], object]:
    """Have transformers' expert modules loop over the experts: other ways need all of them in 16 bit at once.

    Returns what undoes it.
    """
    model_config = getattr(owner, "config", None)
    before = getattr(model_config, "_experts_implementation", None)
    if before is None:
        return lambda: None
    model_config._experts_implementation = "eager"  # type: ignore[union-attr]
    return lambda: setattr(model_config, "_experts_implementation", before)
