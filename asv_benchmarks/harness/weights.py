"""One weight for all contenders, in as many copies as pass before the caches have forgotten the first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

import fourbit
from harness.timing import COLD_BYTES, copies_for

BLOCKSIZE = 64
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


class Weights:
    """Copies of one [N, K] weight for each contender, built when first asked for; each library quantizes its own."""

    cold_bytes = COLD_BYTES

    def __init__(self, shape: tuple[int, int], bnb: Any, seed: int = 0, device: str = "cpu") -> None:
        self.shape = shape
        self.bnb = bnb
        noise = torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device)
        self.plain = noise.mul_(0.02)
        self._built: dict[str, list[Any]] = {}

    def fourbit(self, double_quant: bool = False) -> list[tuple[torch.Tensor, fourbit.QuantState]]:
        """`(packed, state)` of NF4, blocksize 64."""

        def build() -> tuple[Any, int]:
            packed, state = fourbit.quantize_4bit(self.plain, blocksize=BLOCKSIZE, double_quant=double_quant)
            return (packed, state), stored_bytes(packed, state)

        return self.copies("fourbit double" if double_quant else "fourbit", build)

    def torch(self, dtype: str) -> list[torch.Tensor]:
        """The weight itself in `dtype`."""

        def build() -> tuple[torch.Tensor, int]:
            weight = self.plain.to(DTYPES[dtype], copy=True)
            return weight, weight.nbytes

        return self.copies(f"torch {dtype}", build)

    def copies(self, name: str, build: Callable[[], tuple[Any, int]]) -> list[Any]:
        """What `build` returns with its number of bytes, and copies of it."""
        if name not in self._built:
            first, size = build()
            count = copies_for(size, self.cold_bytes)
            self._built[name] = [first, *(_copy(first) for _ in range(count - 1))]
        return self._built[name]


def _copy(weight: Any) -> Any:
    """A deep copy, but with the one code tensor that all weights of a kind share, as in a model."""
    shared = []
    if isinstance(weight, tuple) and isinstance(weight[1], fourbit.QuantState):
        shared = [t for t in (weight[1].code, weight[1].nested_code) if t is not None]
    return copy.deepcopy(weight, {id(t): t for t in shared})


def stored_bytes(packed: torch.Tensor, state: fourbit.QuantState) -> int:
    """Bytes that a product has to read of the weight: packed values and scales, nested ones too."""
    nested = state.nested_absmax
    return packed.nbytes + state.absmax.nbytes + (0 if nested is None else nested.nbytes)


def bind(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    """The call of `function` with these arguments."""
    return lambda: function(*arguments)
