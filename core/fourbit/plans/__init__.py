"""The plan: which tensors of a model are quantized, which are not, by which rule, and how many bytes that makes.

One description of a layer (`layer`), one set of rules on it (`rules`), one record of what they say (`record`); none
knows modules or files. The walk over a model in memory (`fourbit.nn.walk`) or over a folder's headers
(`fourbit.checkpoint.plan`) makes the descriptions; the latter asks the model that config.json names where a plugin
knows that class (`known`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch

from fourbit import dispatch
from fourbit.config import QuantConfig
from fourbit.plans import rules
from fourbit.plans.layer import Layer
from fourbit.plans.record import LARGE, PlannedTensor, QuantPlan
from fourbit.state import quantized_nbytes

__all__ = ["LARGE", "PlannedTensor", "QuantPlan", "planned"]


def planned(
    layers: Sequence[Layer],
    modules: Sequence[Layer],
    config: QuantConfig | None,
    device: torch.device | str,
    source: str,
    described_by: str,
) -> QuantPlan:
    """The plan for what a walk has found.

    Args:
        layers: one for each tensor.
        modules: the layers of the model, which a folder's tensors need not be.
        config: default QuantConfig().
        device: where it is quantized, for the default blocksize.
        source, described_by: as in QuantPlan.
    """
    config = config or QuantConfig()
    blocksize = config.blocksize or dispatch.default_blocksize(torch.device(device))
    decided = replace(config, blocksize=blocksize)
    decisions = [(layer, rules.decide(layer, decided)) for layer in layers]
    tensors = tuple(_planned(layer, decision, config, blocksize) for layer, decision in decisions)
    left = rules.left_modules(modules, [layer for layer, decision in decisions if decision.quantize])
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
        modules=tuple(part.module for part in layer.parts) or (layer.module,),
        deliberate=decision.deliberate,
    )
