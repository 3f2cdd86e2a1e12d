"""Training calls of one layer, forward and backward, and of stacks: what they cost the host."""

from __future__ import annotations

from collections.abc import Callable

import torch

from harness.calls import microseconds

DEEP = 16
"""Layers of a stack; what backward costs once, `torch.autograd.grad` and its engine, is not theirs."""


class Nothing(torch.autograd.Function):
    """The least that a layer whose derivative is in Python costs: no product, no weight."""

    @staticmethod
    def forward(ctx, x):
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(grad)


def training_call(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, depth: int) -> Callable[[], object]:
    """Forward and backward through the layer, `depth` times over; to x, since the layer's weight is frozen."""
    x = x.detach().clone().requires_grad_()
    upstream = torch.ones_like(layer(x))

    def step() -> object:
        y = x
        for _ in range(depth):
            y = layer(y)
        return torch.autograd.grad(y, x, upstream)

    return step


def training_microseconds(
    layers: dict[str, Callable[[torch.Tensor], torch.Tensor]],
    x: torch.Tensor,
    rounds: int = 51,
    wrap: Callable[[Callable[[], object], int], Callable[[], object]] = lambda call, depth: call,
) -> dict[str, tuple[float, float]]:
    """Of each layer: a whole call, and what each further layer of a stack adds to one.

    The layers map x to its own shape, and are interleaved. `wrap` goes around each timed call, of so many layers.
    """

    def measured(depth: int, batch: int) -> dict[str, float]:
        calls = {name: wrap(training_call(layer, x, depth), depth) for name, layer in layers.items()}
        return microseconds(calls, rounds, batch)

    # in large batches: the first calls of each find the processor's caches full of another layer's
    one, deep = measured(1, 300), measured(DEEP, 30)
    return {name: (one[name], (deep[name] - one[name]) / (DEEP - 1)) for name in layers}


def table(found: dict[str, tuple[float, float]], base: str, title: str) -> str:
    """Those times and their ratios to those of the layer `base`, a line each."""
    lines = [f"{title:48s} {'one layer':>9s} {'ratio':>6s} {'each of a stack':>16s} {'ratio':>6s}"]
    one, each = found[base]
    for name, (call, further) in found.items():
        lines.append(f"{name:48s} {call:9.1f} {call / one:6.2f} {further:16.1f} {further / each:6.2f}")
    return "\n".join(lines)
