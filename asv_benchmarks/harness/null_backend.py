"""A backend whose linear does nothing, so that what is left of a call's time is fourbit's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

import fourbit
from fourbit import plugins, registry
from fourbit.backend import Backend
from fourbit.reference import ReferenceBackend
from harness.training import Nothing

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


class NullTrainingBackend(NullBackend):
    """Its results are new tensors, uninitialized, as autograd wants to mark them."""

    def linear_4bit(self, x, weight, out_features, bias=None):
        return torch.empty_like(x)

    def linear_4bit_grad(self, grad, weight, in_features):
        return torch.empty_like(grad)


@contextmanager
def null_backend(result: torch.Tensor, kind: type[NullBackend] = NullBackend) -> Iterator[Backend]:
    """Registers one for the duration of the block, ahead of every other backend for the CPU."""
    backend = kind(result)
    plugins.load()
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
    plain, biased, x = torch.nn.Linear(SIZE, SIZE, bias=False), _biased(), torch.randn(1, SIZE)
    with null_backend(torch.zeros(1, SIZE)) as backend:
        packed, state = fourbit.quantize_4bit(plain.weight.detach(), blocksize=64)
        arguments = (x, state.weight(packed), SIZE, None)
        module, with_bias, double = _packed(plain, biased)
        calls: dict[str, Callable[[], object]] = {
            "backend method, called directly": lambda: backend.linear_4bit(*arguments),
            "fourbit.linear_4bit": lambda: fourbit.linear_4bit(x, packed, state),
            "Linear4bit.__call__": lambda: module(x),
            "Linear4bit.__call__, bias": lambda: with_bias(x),
            "Linear4bit.__call__, double_quant": lambda: double(x),
        }
        yield calls, plain, x


@contextmanager
def training_layers() -> Iterator[tuple[dict[str, Callable[[torch.Tensor], torch.Tensor]], torch.Tensor]]:
    """Frozen layers [64, 64] by name, torch's own first, and x [1, 64]; inside the block fourbit's kernels do nothing.

    Torch's own do, in 0.3 µs a product.
    """
    plain, biased, x = torch.nn.Linear(SIZE, SIZE, bias=False).requires_grad_(False), _biased(), torch.randn(1, SIZE)
    with null_backend(x, NullTrainingBackend):
        module, with_bias, double = _packed(plain, biased)
        yield (
            {
                "torch nn.Linear": plain,
                "torch nn.Linear, bias": biased,
                "autograd.Function that does nothing": Nothing.apply,
                "Linear4bit": module,
                "Linear4bit, bias": with_bias,
                "Linear4bit, double_quant": double,
            },
            x,
        )


def _biased() -> torch.nn.Linear:
    return torch.nn.Linear(SIZE, SIZE).requires_grad_(False)


def _packed(plain: torch.nn.Linear, biased: torch.nn.Linear) -> list[fourbit.nn.Linear4bit]:
    """Without bias, with it, and double-quantized."""
    config = fourbit.QuantConfig(blocksize=64)
    nested = fourbit.QuantConfig(blocksize=64, double_quant=True)
    return [
        fourbit.nn.Linear4bit.from_linear(linear, how)
        for linear, how in ((plain, config), (biased, config), (plain, nested))
    ]
