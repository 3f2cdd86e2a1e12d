"""A backend whose linear does nothing, so that what is left of a call's time is fourbit's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

import fourbit
from fourbit import registry
from fourbit.backend import Backend
from fourbit.reference import ReferenceBackend

SIZE = 64


class NullBackend(ReferenceBackend):
    """Quantizes as the reference does, and returns one and the same tensor from every linear."""

    api_version = 2
    name = "null"
    device_types = ("cpu",)
    priority = 1000

    def __init__(self, result: torch.Tensor) -> None:
        self.result = result

    def linear_4bit(self, x, weight, out_features, bias=None):
        return self.result


@contextmanager
def null_backend(result: torch.Tensor) -> Iterator[Backend]:
    """Registers it for the duration of the block, ahead of every other backend for the CPU."""
    backend = NullBackend(result)
    registry.load_plugins()
    registry.register(backend)
    try:
        yield backend
    finally:
        registry.unregister("null")


@contextmanager
def overhead_calls() -> Iterator[tuple[dict[str, Callable[[], object]], torch.nn.Linear, torch.Tensor]]:
    """Calls with x [1, 64] on a weight [64, 64], by name, the backend's own method first; the layer in 32 bits, and x.

    No kernel does anything inside the block.
    """
    plain = torch.nn.Linear(SIZE, SIZE, bias=False)
    biased = torch.nn.Linear(SIZE, SIZE).requires_grad_(False)
    x = torch.randn(1, SIZE)
    config = fourbit.QuantConfig(blocksize=64)
    nested = fourbit.QuantConfig(blocksize=64, double_quant=True)
    with null_backend(torch.zeros(1, SIZE)) as backend:
        packed, state = fourbit.quantize_4bit(plain.weight.detach(), blocksize=64)
        arguments = (x, state.weight(packed), SIZE, None)
        module, with_bias, double = (
            fourbit.nn.Linear4bit.from_linear(linear, how)
            for linear, how in ((plain, config), (biased, config), (plain, nested))
        )
        calls: dict[str, Callable[[], object]] = {
            "backend method, called directly": lambda: backend.linear_4bit(*arguments),
            "fourbit.linear_4bit": lambda: fourbit.linear_4bit(x, packed, state),
            "Linear4bit.__call__": lambda: module(x),
            "Linear4bit.__call__, bias": lambda: with_bias(x),
            "Linear4bit.__call__, double_quant": lambda: double(x),
        }
        yield calls, plain, x
