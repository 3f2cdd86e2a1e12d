"""plan: what quantizing a model or a folder would do.

A folder's tensors are those of the model that a plugin knows by its config.json; else names and shapes describe them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fourbit import plugins
from fourbit.checkpoint.compound import Compound
from fourbit.checkpoint.reader import Checkpoint, TensorInfo
from fourbit.config import QuantConfig
from fourbit.nn.quantize import plan_model
from fourbit.nn.walk import describe_model
from fourbit.plans import PlannedTensor, QuantPlan, known, planned
from fourbit.plans.layer import Layer, is_transposed, kind_by_name, role_by_name

_UNKNOWN = "its config.json names no class that a plugin knows"

_WHOLE = ("linear", "transposed", "declared")
"""Kinds of weights of which a part cannot be quantized by itself."""


def plan(
    model_or_folder: nn.Module | Checkpoint | Compound | str | os.PathLike[str],
    config: QuantConfig | None = None,
    *,
    device: torch.device | str | None = None,
) -> QuantPlan:
    """What quantizing a model would do, without doing it.

    Args:
        model_or_folder: an nn.Module (also on the meta device), or a folder of safetensors, of which only the
            headers are read; an open Checkpoint or Compound has read them already. Where its config.json names a class
            that a plugin knows (transformers', say), that model says what its tensors are; else their names do.
            `described_by` of the plan tells which. Of a folder of several models the plan is that of all of them.
        config: default QuantConfig().
        device: where it would be quantized, for the default blocksize; None: where the model is, or the CPU.

    Raises OSError or ValueError for a folder that cannot be read.
    """
    if isinstance(model_or_folder, nn.Module):
        return plan_model(model_or_folder, config, device)
    if isinstance(model_or_folder, Checkpoint):
        return _plan_checkpoint(model_or_folder, config, device)
    whole = model_or_folder if isinstance(model_or_folder, Compound) else Compound(model_or_folder)
    return combined(whole, plan_members(whole, config, device))


def plan_members(
    source: Compound,
    config: QuantConfig | None,
    device: torch.device | str | None,
    components: Sequence[str] | None = None,
) -> dict[str, QuantPlan]:
    """A plan for each model of a source, by its folder; see `Compound.chosen`, which raises CheckpointError."""
    left = source.chosen(components)
    return {
        folder: _plan_checkpoint(member.checkpoint, config, device)
        if folder not in left
        else _as_it_is(member.checkpoint, left[folder], config, device)
        for folder, member in source.members.items()
    }


def combined(source: Compound, plans: Mapping[str, QuantPlan]) -> QuantPlan:
    """The plans of all models of a source as one, in which names have their model's folder in front."""
    if list(plans) == [""]:
        return plans[""]
    prefixes = {folder: source.members[folder].prefix for folder in plans}
    tensors = tuple(_below(prefixes[folder], t) for folder, each in plans.items() for t in each.tensors)
    described = "; ".join(f"{folder or '.'}: {each.described_by}" for folder, each in plans.items() if each.quantized)
    modules = tuple(prefixes[folder] + name for folder, each in plans.items() for name in each.left_modules)
    first = next(iter(plans.values()))
    return replace(first, tensors=tensors, source=str(source.path), described_by=described, left_modules=modules)


def _below(prefix: str, tensor: PlannedTensor) -> PlannedTensor:
    modules = tuple(prefix + module for module in tensor.modules)
    return replace(tensor, name=prefix + tensor.name, module=prefix + tensor.module, modules=modules)


def _as_it_is(
    checkpoint: Checkpoint, why: str, config: QuantConfig | None, device: torch.device | str | None
) -> QuantPlan:
    """The plan for a model that is only carried over."""
    tensors = [
        PlannedTensor(
            name, info.shape, info.dtype, "skip", why, info.nbytes, info.nbytes, name.rpartition(".")[0], "other"
        )
        for name, info in checkpoint.entries.items()
    ]
    return replace(planned([], [], config, device or "cpu", str(checkpoint.path), ""), tensors=tuple(tensors))


def _plan_checkpoint(
    checkpoint: Checkpoint, config: QuantConfig | None, device: torch.device | str | None
) -> QuantPlan:
    found = _described(checkpoint)
    return planned(found.layers, found.modules, config, device or "cpu", str(checkpoint.path), found.described_by)


def transposed(source: Compound) -> frozenset[str]:
    """Names of the weights that their layers hold as [in, out] and whose 4-bit form is [out, in]: transformers' Conv1D.

    No file says it, and those of bitsandbytes could not: the model does, or the names, as in `plan`.
    """
    return frozenset(
        member.prefix + layer.name
        for member in source.members.values()
        for layer in _described(member.checkpoint).layers
        if layer.kind == "transposed"
    )


@dataclass(frozen=True)
class _Described:
    """A folder's tensors and its model's layers, and what said so."""

    layers: list[Layer]
    modules: list[Layer]
    described_by: str


def _described(checkpoint: Checkpoint) -> _Described:
    companions = checkpoint.companions()
    names = tuple(name for name in checkpoint.entries if name not in companions)
    model, reason = plugins.ask("fourbit_describe_model", known.KnownModel, config=checkpoint.config, names=names)
    described = by_name = _by_names(checkpoint)
    modules, described_by = list(by_name.values()), f"names ({reason or _UNKNOWN})"
    if model is not None:
        modules, described_by = describe_model(model.model), model.source
        described = _by_model(model, modules, checkpoint, by_name)
    packed = companions | checkpoint.quantized().keys()
    layers = [
        replace(described[name], note="4-bit already") if name in packed else described[name]
        for name in checkpoint.entries
    ]
    return _Described(layers, modules, described_by)


def _by_names(checkpoint: Checkpoint) -> dict[str, Layer]:
    """A layer for each tensor, from names and shapes alone; also for tied ones that only the header names."""
    model_type = checkpoint.config.get("model_type")
    found = {name: _from_name(name, info, model_type) for name, info in checkpoint.entries.items()}
    # safetensors.torch.save_model writes one of several tied tensors, and of the others {name: the one's name}
    for name, kept in checkpoint.metadata.items():
        if name not in found and kept in checkpoint.entries:
            tied = _from_name(name, checkpoint.entries[kept], model_type)
            found[kept] = replace(found[kept], tied=(*found[kept].tied, tied))
            found[name] = replace(tied, first=kept, nbytes=0, tied=(found[kept],))
    return found


def _from_name(name: str, info: TensorInfo, model_type: object) -> Layer:
    module, _, leaf = name.rpartition(".")
    shape = tuple(info.shape)
    kind = kind_by_name(name, shape)
    if kind == "linear" and is_transposed(model_type, module):
        kind = "transposed"
    return Layer(name, module, leaf, shape, info.dtype, info.nbytes, kind, role_by_name(module, shape))


def _by_model(
    model: known.KnownModel, layers: list[Layer], checkpoint: Checkpoint, by_name: Mapping[str, Layer]
) -> dict[str, Layer]:
    """A layer for each tensor: the model's, where it goes to one, with the name and the size that it has here."""
    parts = {layer.name: layer for layer in layers}
    buffers = {name for name, _ in model.model.named_buffers(remove_duplicate=False)}
    found = {}
    for name in checkpoint.entries:
        target = model.targets.get(name, known.Target(()))
        goals = [parts[goal] for goal in target.names if goal in parts]
        if goals:
            found[name] = _as_stored(goals, target, by_name[name])
        elif any(goal in buffers for goal in target.names):
            found[name] = replace(by_name[name], note="buffer")
        else:
            found[name] = by_name[name]
    return found


def _as_stored(goals: list[Layer], target: known.Target, stored: Layer) -> Layer:
    """What the tensor `stored` is, knowing which of the model's it becomes."""
    goal = next((g for g in goals if g.kind in _WHOLE), goals[0])
    kind = goal.kind
    parts: tuple[Layer, ...] = ()
    if target.rearranged and kind in _WHOLE:
        whole_rows = target.by_rows and all(g.kind == "linear" and g.shape[1:] == stored.shape[1:] for g in goals)
        kind, parts = ("linear", tuple(goals)) if whole_rows else ("rearranged", ())
    elif kind == "experts" and len(stored.shape) == 2:
        kind = "linear"  # one expert's matrix
    elif kind in _WHOLE and len(stored.shape) != len(goal.shape):
        kind = "other"  # folder and model disagree
    return replace(
        goal,
        name=stored.name,
        shape=stored.shape,
        dtype=stored.dtype,
        nbytes=stored.nbytes,
        kind=kind,
        parts=parts,
        aliases=(stored.name, stored.module, goal.name),
    )
