"""The record of a plan: every tensor, its rule, its bytes before and after."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from fourbit.config import QuantConfig
from fourbit.literal import literal
from fourbit.state import dtype_name

LARGE = 1 << 20
"""Elements from which a tensor that stays in 16 bit by no deliberate choice is pointed out: 2 MB."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of a plan.

    Attributes:
        name: of the tensor, as in the state dict.
        shape, dtype: as it is now.
        action: "quantize" or "skip".
        rule: in words, why.
        bytes_before, bytes_after: of storage; both 0 for a tensor that shares another's.
        module: dotted name of the module that owns it, as the model calls it.
        kind: see `fourbit.plans.layer.Layer`.
        modules: of a matrix whose rows are divided among several layers when it is loaded, all of them; else
            `module` alone.
        deliberate: whether a skip is by choice (the user's, or a rule that holds for every model), or because
            fourbit does not know how.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    action: str
    rule: str
    bytes_before: int
    bytes_after: int
    module: str
    kind: str
    modules: tuple[str, ...] = ()
    deliberate: bool = True

    @property
    def parameters(self) -> int:
        """Elements, 0 for a tensor that shares another's storage."""
        return prod(self.shape) if self.bytes_before else 0

    @property
    def transposed(self) -> bool:
        """Whether rows and columns change places on the way to 4 bits."""
        return self.kind == "transposed"

    @property
    def shape_in_4bit(self) -> tuple[int, ...]:
        """The shape of its 4-bit form, if it is quantized."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def large_left(self) -> bool:
        """Whether it is a large tensor that stays in 16 bit though nobody chose so."""
        return self.action == "skip" and not self.deliberate and prod(self.shape) >= LARGE

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": dtype_name(self.dtype),
            "action": self.action,
            "rule": self.rule,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "large_left": self.large_left,
        }


@dataclass(frozen=True)
class QuantPlan:
    """What quantizing a model would do. `print(plan)` is a table; `plan.to_dict()` is JSON.

    Attributes:
        tensors: every parameter (of a folder: every tensor), in order.
        config: as it was asked for.
        blocksize: that `config.blocksize` comes to.
        source: the model's class, or the folder.
        described_by: what said which layers there are: the model itself, or the names of the folder's tensors
            and the reason why no model was asked.
        left_modules: names of the modules whose own `weight` is a matrix that stays, for readers that would make
            every other nn.Linear 4-bit; tied output heads, which have no tensor of their own, are among them.
    """

    tensors: tuple[PlannedTensor, ...]
    config: QuantConfig
    blocksize: int
    source: str = field(default="", compare=False)
    described_by: str = field(default="", compare=False)
    left_modules: tuple[str, ...] = ()

    @property
    def quantized(self) -> tuple[PlannedTensor, ...]:
        """The tensors that are quantized."""
        return tuple(t for t in self.tensors if t.action == "quantize")

    @property
    def skipped(self) -> tuple[PlannedTensor, ...]:
        """The tensors that stay as they are."""
        return tuple(t for t in self.tensors if t.action == "skip")

    @property
    def large_left(self) -> tuple[PlannedTensor, ...]:
        """Large tensors that stay in 16 bit though nobody chose so."""
        return tuple(t for t in self.tensors if t.large_left)

    @property
    def bytes_before(self) -> int:
        """Bytes of all tensors now."""
        return sum(t.bytes_before for t in self.tensors)

    @property
    def bytes_after(self) -> int:
        """Bytes of all tensors afterwards, scales included.

        Not counted are code tables: 64 bytes a weight, and 1,028 more where it is double-quantized.
        """
        return sum(t.bytes_after for t in self.tensors)

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(t.parameters for t in self.tensors)

    @property
    def quantized_parameters(self) -> int:
        """Elements of the tensors that are quantized."""
        return sum(t.parameters for t in self.quantized)

    @property
    def bits_per_quantized_parameter(self) -> float:
        """Bits an element of the quantized tensors, scales included; 0 if there are none."""
        count = self.quantized_parameters
        return 8 * sum(t.bytes_after for t in self.quantized) / count if count else 0.0

    @property
    def bits_per_parameter(self) -> float:
        """Bits an element of the whole model; 0 for an empty one."""
        return 8 * self.bytes_after / self.parameters if self.parameters else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        sums = ("parameters", "quantized_parameters", "bytes_before", "bytes_after")
        bits = ("bits_per_quantized_parameter", "bits_per_parameter")
        return {
            "source": self.source,
            "described_by": self.described_by,
            "config": self.config.to_dict(),
            "blocksize": self.blocksize,
            **{name: getattr(self, name) for name in (*sums, *bits)},
            "large_left": [t.name for t in self.large_left],
            "tensors": [t.to_dict() for t in self.tensors],
        }

    def __str__(self) -> str:
        width = max((len(literal(t.name)) for t in self.tensors), default=4)
        lines = [f"{'tensor':{width}}  {'shape':>18}  {'before':>13}  {'after':>13}  what and why"]
        for t in self.tensors:
            shape = "×".join(map(str, t.shape))
            mark = "  <-- LARGE, STAYS AS IT IS" if t.large_left else ""
            lines.append(
                f"{literal(t.name):{width}}  {shape:>18}  {t.bytes_before:>13,}  {t.bytes_after:>13,}"
                f"  {t.action}: {t.rule}{mark}"
            )
        return "\n".join([*map(literal, lines), self.summary()])

    def summary(self) -> str:
        """The totals, and every large tensor that stays in 16 bit, in a few lines."""
        lines = [
            f"{len(self.quantized)} of {len(self.tensors)} tensors quantized to {self.config.quant_type}, blocksize"
            f" {self.blocksize}: {self.bytes_before:,} -> {self.bytes_after:,} bytes;"
            f" {self.bits_per_quantized_parameter:.3f} bits per quantized parameter,"
            f" {self.bits_per_parameter:.3f} bits per parameter of the whole",
            f"layers as described by {self.described_by}",
        ]
        chosen = [t for t in self.skipped if t.parameters >= LARGE and not t.large_left]
        if chosen:
            names = ", ".join(f"{t.name} ({t.bytes_after / 1e6:.1f} MB, {t.rule})" for t in chosen)
            lines.append(f"large tensors that stay as they are by rule: {names}")
        for t in self.large_left:
            lines.append(f"WARNING: {t.name} ({t.bytes_after / 1e6:.1f} MB) STAYS AS IT IS: {t.rule}")
        return "\n".join(map(literal, lines))
