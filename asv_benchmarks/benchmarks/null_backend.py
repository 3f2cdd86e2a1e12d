"""A backend whose linear does nothing, so that what is left of a call's time is fourbit's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fourbit import plugins, registry
from fourbit.backend import Backend
from fourbit.reference import ReferenceBackend


class NullBackend(ReferenceBackend):
    """Quantizes as the reference does, and returns one and the same tensor from every linear."""

    api_version = 1
    name = "null"
    device_types = ("cpu",)
    priority = 1000

    def __init__(self, result: torch.Tensor) -> None:
        self.result = result

    def linear_4bit(self, x, packed, absmax, code, blocksize, out_features, *rest):
        return self.result


@contextmanager
def null_backend(result: torch.Tensor) -> Iterator[Backend]:
    """Registers it for the duration of the block, ahead of every other backend for the CPU."""
    backend = NullBackend(result)
    plugins.load()
    registry.register(backend)
    try:
        yield backend
    finally:
        registry.unregister("null")
