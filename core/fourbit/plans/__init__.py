"""The plan: which tensors of a model are quantized, which are not, by which rule, and how many bytes that makes.

One description of a layer (`layer`), made by a walk over a model in memory (`model`) or over a folder (`folder`),
which asks the model that its config.json names where a plugin knows that class (`known`); one set of rules on it
(`rules`).
"""

from __future__ import annotations

import os
from math import prod
from pathlib import Path

import torch
from torch import nn

from fourbit import dispatch
from fourbit.checkpoint.walk import describe_folder
from fourbit.config import QuantConfig
from fourbit.nn.walk import describe_model
from fourbit.plans import rules
from fourbit.plans.layer import Layer
from fourbit.plans.record import LARGE, PlannedTensor, QuantPlan
from fourbit.state import quantized_nbytes

__all__ = ["LARGE", "PlannedTensor", "QuantPlan", "plan"]


def plan(
    model_or_folder: nn.Module | str | os.PathLike[str],
    config: QuantConfig | None = None,
    *,
    device: torch.device | str | None = None,
) -> QuantPlan:
    """What quantizing a model would do, without doing it.

    Args:
        model_or_folder: an nn.Module (also on the meta device), or a folder of safetensors, of which only the
            headers are read. Where its config.json names a class that a plugin knows (transformers', say), that
            model says what its tensors are; else their names do. `described_by` of the plan tells which.
        config: default QuantConfig().
        device: where it would be quantized, for the default blocksize; None: where the model is, or the CPU.

    Raises OSError or ValueError for a folder that cannot be read.
    """
    config = config or QuantConfig()
    if isinstance(model_or_folder, nn.Module):
        layers = modules = describe_model(model_or_folder)
        where = next((p.device for p in model_or_folder.parameters() if p.device.type != "meta"), None)
        source, described_by = type(model_or_folder).__name__, "the model"
    else:
        described = describe_folder(Path(model_or_folder))
        layers, modules, described_by = described.layers, described.modules, described.described_by
        where, source = None, str(model_or_folder)
    chosen = torch.device(device) if device is not None else where or torch.device("cpu")
    blocksize = config.blocksize or dispatch.default_blocksize(chosen)
    decisions = [rules.decide(layer, config) for layer in layers]
    tensors = tuple(
        _planned(layer, decision, config, blocksize) for layer, decision in zip(layers, decisions, strict=True)
    )
    quantized = [layer for layer, decision in zip(layers, decisions, strict=True) if decision.quantize]
    left = rules.left_modules(modules, quantized)
    return QuantPlan(tensors, config, blocksize, source, described_by, left)


def _planned(layer: Layer, decision: rules.Decision, config: QuantConfig, blocksize: int) -> PlannedTensor:
    after = layer.nbytes
    if decision.quantize and layer.nbytes:
        after = quantized_nbytes(prod(layer.shape), blocksize, config.double_quant)
    return PlannedTensor(
        name=layer.name,
        shape=layer.shape,
        dtype=layer.dtype,
        action="quantize" if decision.quantize else "skip",
        rule=decision.rule,
        bytes_before=layer.nbytes,
        bytes_after=after,
        module=layer.module,
        kind=layer.kind,
        deliberate=decision.deliberate,
    )
