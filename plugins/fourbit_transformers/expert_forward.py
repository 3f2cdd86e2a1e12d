"""The experts implementation "fourbit" of transformers 5: all experts of a projection in one 4-bit product.

Importing this module registers it. transformers' modules of stacked experts then take it by name
(`config._experts_implementation`, `model.set_experts_implementation("fourbit")`); `experts.use_fourbit_experts` sets it
where a model has such weights in 4 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear

from fourbit.nn import ExpertWeights4bit
from fourbit.nn.routing import by_expert


class _Name(str):
    """A name that is pickled as a look-up here: whoever unpickles a model has the implementation registered."""

    def __reduce__(self) -> str:
        return "IMPLEMENTATION"


IMPLEMENTATION = _Name("fourbit")
"""Its name among transformers' experts implementations."""


class AdaptedExperts:
    """Stacked weights with low-rank updates beside them, which stand in the place of the weights during a forward.

    Attributes:
        weights: in 4 bits.
        updates: `(left, right, scaling)` of each adapter: scaling · left[e] @ right[e] is what it adds to weights[e].
    """

    def __init__(self, weights: ExpertWeights4bit, updates: list[tuple[Tensor, Tensor, float]]) -> None:
        self.weights = weights
        self.updates = updates


def grouped_linear(weights: Any, x: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    """Rows of x [T, in], sorted by expert and ending at `offsets`, times each one's matrix: [T, out].

    `weights` [experts, out, in], with `transposed` [experts, in, out], are in 4 bits, with or without adapters, or in
    16 or 32 bit. What is in rows after the last offset is undefined.
    """
    if isinstance(weights, AdaptedExperts):
        y = grouped_linear(weights.weights, x, offsets, transposed)
        own = weights.weights.own_experts
        for left, right, scaling in weights.updates:
            left, right = left[own.start : own.stop], right[own.start : own.stop]
            first, second = (left, right) if transposed else (right, left)
            y = y + scaling * _dense(second, _dense(first, x.to(y.dtype), offsets, transposed), offsets, transposed)
        return y
    if isinstance(weights, ExpertWeights4bit):
        y4: Tensor = weights(x, offsets, transposed)
        return y4
    return _dense(weights, x, offsets, transposed)


def _dense(weights: Tensor, x: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    """transformers' grouped product. torch's, which it runs on, wants rows of whole 16 bytes: others are filled up."""
    unit = 16 // weights.element_size()
    rows, columns = (-size % unit for size in weights.shape[-2:])
    if not rows and not columns:
        y: Tensor = _grouped_linear(x, weights.contiguous(), offsets, is_transposed=transposed)
        return y
    out = weights.shape[-1 if transposed else -2]
    x = nn.functional.pad(x, (0, rows if transposed else columns))
    weights = nn.functional.pad(weights, (0, columns, 0, rows))
    y = _grouped_linear(x, weights, offsets, is_transposed=transposed)
    return y[:, :out]


def fourbit_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of a module of stacked experts: hidden_states [T, hidden] to the weighted sum of its experts'.

    top_k_index and top_k_weights are [T, k]. An index of `num_experts` or more (another rank's expert, under expert
    parallelism) adds nothing, nor does an expert of another process where `from_pretrained(tp_plan=…)` has divided
    them: then the processes' sums are summed up. Of what is computed nothing depends on values on the host.
    """
    k = top_k_index.shape[1]
    split, own = _divided(self)
    if split is not None:
        from fourbit.nn.parallel import entered, summed

        hidden_states, top_k_weights = (entered(each, split) for each in (hidden_states, top_k_weights))
        top_k_index = top_k_index - own.start
        top_k_index = torch.where((top_k_index < 0) | (top_k_index >= len(own)), len(own), top_k_index)
    routed = by_expert(top_k_index, len(own))
    experts, order, offsets = routed
    x = hidden_states[order // k]
    elsewhere = None
    if split is not None or getattr(self, "_is_expert_parallel", True):  # older versions do not say
        elsewhere = (experts >= len(own)).unsqueeze(-1)
        experts = experts.clamp(max=max(len(own) - 1, 0))  # they have no bias here
        x = x.masked_fill(elsewhere, 0)  # and no gradient

    def project(name: str, x: Tensor) -> Tensor:
        weights = getattr(self, name)
        if split is not None and isinstance(weights, Tensor):  # one that is left in 16 bit, and whole
            weights = weights[own.start : own.stop]
        y = grouped_linear(weights, x, offsets, self.is_transposed)
        if elsewhere is not None:
            y = y.masked_fill(elsewhere, 0)
        return y + getattr(self, f"{name}_bias")[experts + min(own.start, self.num_experts - 1)] if self.has_bias else y

    if self.has_gate:
        y = self._apply_gate(project("gate_up_proj", x))
    else:
        y = self.act_fn(project("up_proj", x))
    y = project("down_proj", y)
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    weights = top_k_weights.reshape(-1)[order].unsqueeze(-1)
    if elsewhere is not None:
        weights = weights.masked_fill(elsewhere, 0)
    total = routed.summed(y * weights, k).to(hidden_states.dtype)
    return total if split is None else summed(total, split)


def _divided(module: Any) -> tuple[Any, range]:
    """How its experts are divided over processes, or None, and which of them are here."""
    for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        weights = getattr(module, name)
        weights = weights.weights if isinstance(weights, AdaptedExperts) else weights
        if isinstance(weights, ExpertWeights4bit) and weights.split is not None:
            return weights.split, weights.own_experts
    return None, range(module.num_experts)


def implementation(module: nn.Module) -> str | None:
    """The experts implementation that its forward runs; None where it is no such module, but has a loop of its own."""
    config: Any = getattr(module, "config", None)
    return getattr(config, "_experts_implementation", None) if hasattr(module, "is_transposed") else None


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, fourbit_experts_forward)
