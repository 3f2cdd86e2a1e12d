"""quantize_model: put 4-bit modules in place of a model's linear layers and stacked expert weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import nn

from fourbit import plugins
from fourbit.config import QuantConfig
from fourbit.nn.packed import PackedModule, replacement
from fourbit.nn.walk import describe_model
from fourbit.plans import QuantPlan, planned


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
    steps = plan_model(model, config)
    if strict and steps.large_left:
        listing = "".join(f"\n  {t.name} {list(t.shape)}: {t.rule}" for t in steps.large_left)
        raise LargeTensorError(
            f"{len(steps.large_left)} large tensor(s) would stay in 16 bit; name their modules in skip_modules if that"
            f" is meant:{listing}"
        )
    twins: dict[int, PackedModule] = {}
    made: dict[str, PackedModule] = {}
    for step in steps.quantized:
        owner, leaf = model.get_submodule(step.module), step.name.rsplit(".", 1)[-1]
        found = replacement(owner, leaf)
        assert found is not None  # by the walk that the plan is made of
        cls, replaced = found
        if replaced is model:
            raise ValueError(f"the model is itself a {type(model).__name__}: use {cls.__name__}.from_module")
        weight = id(owner._parameters[leaf])
        made[step.name] = cls.from_module(replaced, steps.config, step.name, twins.get(weight))
        twins.setdefault(weight, made[step.name])
    swap(model, made)
    plugins.tell("fourbit_model_quantized", model=model, config=config or QuantConfig())
    return model


def plan_model(
    model: nn.Module, config: QuantConfig | None = None, device: torch.device | str | None = None
) -> QuantPlan:
    """`fourbit.plan` of a model; `device` None: where its parameters are, or the CPU."""
    layers = describe_model(model)
    where = device or next((p.device for p in model.parameters() if p.device.type != "meta"), "cpu")
    return planned(layers, layers, config, where, type(model).__name__, "the model")


def module_places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each module is in its parents, by its id; a shared one has several places."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, attribute))
    return places


def swap(model: nn.Module, modules: Mapping[str, PackedModule]) -> None:
    """Put 4-bit modules in place of the weights named: everywhere in the model, and all of them or none."""
    places = module_places(model)
    swaps: list[tuple[PackedModule, nn.Module, str]] = []
    for name, new in modules.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        whole = new.replaces is not nn.Parameter  # the module, that is, and a shared one has several places
        swaps += [(new, *place) for place in (places[id(owner)] if whole else [(owner, leaf)])]
    with ExitStack() as undo:
        for new, parent, attribute in swaps:
            new.put(parent, attribute, undo)
        undo.pop_all()
