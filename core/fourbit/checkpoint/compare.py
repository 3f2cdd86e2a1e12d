"""How far the weights of two checkpoints are apart, tensor by tensor; either side may be in 4 bits.

Sums are float64, over pieces of a million elements; in memory is one tensor of each side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourbit.checkpoint.compound import Compound
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.inspect import TensorFacts, list_tensors
from fourbit.checkpoint.plan import transposed
from fourbit.functional import dequantize_4bit

_PIECE = 1 << 20
_HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


@dataclass(frozen=True)
class TensorDifference:
    """One tensor, B measured against A.

    Attributes:
        name: of the tensor in A.
        name_in_b: its name in B, another one only for tensors that share their storage there.
        shape: in A.
        type_a, type_b: "bfloat16" and the like, or the quant_type of a 4-bit weight.
        parameters: elements.
        rmse: root of the mean squared difference.
        relative_rmse: rmse over the root mean square of A; None if A is all zero, likewise
        sqnr_db: ten times the logarithm of A's power over the difference's; None, too, if there is no difference.
        max_abs_error: the largest difference of two elements.
        identical: no element differs.
        error: why they cannot be compared (the figures are None then), else None.
    """

    name: str
    name_in_b: str
    shape: tuple[int, ...]
    type_a: str
    type_b: str
    parameters: int
    rmse: float | None = None
    relative_rmse: float | None = None
    sqnr_db: float | None = None
    max_abs_error: float | None = None
    identical: bool = False
    error: str | None = None

    @property
    def rank(self) -> tuple[float, float, str]:
        """Sorts the worst first: what cannot be compared, then by SQNR, the identical ones last."""
        if self.error is not None:
            return (0, 0.0, self.name)
        if self.identical:
            return (2, 0.0, self.name)
        return (1, -math.inf if self.sqnr_db is None else self.sqnr_db, self.name)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "shape": list(self.shape)}


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints, tensor by tensor.

    Attributes:
        a, b: what was compared.
        tensors: the worst first.
        only_in_a, only_in_b: names without a counterpart.
        total: all tensors that could be compared and differ, taken as one; None if there is none.
    """

    a: Path
    b: Path
    tensors: tuple[TensorDifference, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    total: TensorDifference | None

    @property
    def errors(self) -> tuple[TensorDifference, ...]:
        """The tensors that could not be compared."""
        return tuple(t for t in self.tensors if t.error is not None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        keys = ("parameters", "rmse", "relative_rmse", "sqnr_db", "max_abs_error")
        return {
            "a": str(self.a),
            "b": str(self.b),
            "compared": len(self.tensors) - len(self.errors),
            "identical": sum(t.identical for t in self.tensors),
            "errors": len(self.errors),
            "total_of_differing": None if self.total is None else {key: getattr(self.total, key) for key in keys},
            "only_in_a": list(self.only_in_a),
            "only_in_b": list(self.only_in_b),
            "tensors": [t.to_dict() for t in self.tensors],
        }


@dataclass
class _Sums:
    """Running float64 sums over pieces."""

    count: int = 0
    signal: float = 0.0
    noise: float = 0.0
    largest: float = 0.0

    def add(self, other: _Sums) -> None:
        """Those of another tensor."""
        self.count += other.count
        self.signal += other.signal
        self.noise += other.noise
        self.largest = max(self.largest, other.largest)

    def figures(self) -> dict[str, Any]:
        """The figures of a TensorDifference."""
        n = max(self.count, 1)
        known = self.noise > 0 and self.signal > 0
        return {
            "rmse": math.sqrt(self.noise / n),
            "relative_rmse": math.sqrt(self.noise / self.signal) if self.signal > 0 else None,
            "sqnr_db": 10 * (math.log10(self.signal) - math.log10(self.noise)) if known else None,
            "max_abs_error": self.largest,
        }


def compare_checkpoints(
    a: str | Path, b: str | Path, *, progress: Callable[[str, int, int], None] | None = None
) -> Comparison:
    """Measure each tensor of `b` against the one of the same name in `a`; folders or files, plain or 4-bit.

    `progress` is called after each tensor with its name, the parameters done and all parameters. Raises
    CheckpointError if either is malformed, or if they have no name in common. Shapes that differ and values
    that are not finite are the error of that tensor only.
    """
    with Compound(a) as left, Compound(b) as right:
        names_a, names_b = ({t.name: t for t in list_tensors(side)} for side in (left, right))
        tied_a, tied_b = _tied_embeddings(left, names_a), _tied_embeddings(right, names_b)
        pairs = {name: found for name in names_a if (found := _counterpart(name, right, names_b, tied_b)) is not None}
        used = set(pairs.values())
        # a name that only B has may be one that A keeps once for two
        only_b = [name for name in names_b if name not in used and _counterpart(name, left, names_a, tied_a) is None]
        if not pairs:
            raise CheckpointError(f"{left.path} and {right.path} have no tensor name in common")
        turned = _turned(left, right, names_a, names_b, pairs)
        total, whole, done = sum(names_a[name].parameters for name in pairs), _Sums(), 0
        found_list = []
        for name, name_b in pairs.items():
            found_list.append(_difference(left, right, names_a[name], names_b[name_b], name in turned, whole))
            done += names_a[name].parameters
            if progress is not None:
                progress(name, done, total)
        only_a = tuple(name for name in names_a if name not in pairs)
        all_of_it = None
        if whole.count:
            all_of_it = TensorDifference("", "", (), "", "", whole.count, **whole.figures())
        ranked = tuple(sorted(found_list, key=lambda t: t.rank))
        return Comparison(left.path, right.path, ranked, only_a, tuple(only_b), all_of_it)


def _tied_embeddings(source: Compound, names: Mapping[str, TensorFacts]) -> dict[str, str]:
    """The tensor that an output head without one of its own is tied to, by its model's prefix, longest first."""
    tied: dict[str, str] = {}
    members = sorted(source.members.values(), key=lambda member: len(member.prefix), reverse=True)
    for prefix in (m.prefix for m in members if m.checkpoint.config.get("tie_word_embeddings")):
        found = [n for n in names if n.endswith(_EMBEDDINGS) and n.startswith(prefix)]
        if len(found) == 1:
            tied[prefix] = found[0]
    return tied


def _counterpart(name: str, other: Compound, names: Mapping[str, TensorFacts], tied: Mapping[str, str]) -> str | None:
    """The name under which `other` has the tensor: its own, or that of the tensor which it is tied to."""
    if name in names:
        return name
    alias = other.aliases.get(name)  # as safetensors' save_model notes the names that it drops
    if alias in names:
        return alias
    return next((tied[prefix] for prefix in tied if name.startswith(prefix)), None) if name.endswith(_HEAD) else None


def _turned(
    a: Compound,
    b: Compound,
    names_a: Mapping[str, TensorFacts],
    names_b: Mapping[str, TensorFacts],
    pairs: Mapping[str, str],
) -> frozenset[str]:
    """The tensors of A that have rows for columns on the side where they are in 4 bits."""
    mixed = {name for name, other in pairs.items() if names_a[name].is_4bit != names_b[other].is_4bit}
    if not mixed:
        return frozenset()
    in_a, in_b = transposed(a), transposed(b)  # a file without a config.json knows less than the other side may
    return frozenset(name for name in mixed if name in in_a or pairs[name] in in_b)


def _difference(
    a: Compound, b: Compound, in_a: TensorFacts, in_b: TensorFacts, turned: bool, whole: _Sums
) -> TensorDifference:
    base = (in_a.name, in_b.name, in_a.shape, in_a.type, in_b.type, in_a.parameters)
    if in_a.shape != (in_b.shape[::-1] if turned else in_b.shape):
        return TensorDifference(*base, error=f"shape {list(in_a.shape)} in A and {list(in_b.shape)} in B")
    left, right = _flat(a, in_a), _flat(b, in_b)
    if turned:
        right = right.view(in_b.shape).T.reshape(-1)
    sums = _Sums(count=in_a.parameters)
    for start in range(0, sums.count, _PIECE):
        x, y = _piece(left, start), _piece(right, start)
        odd = ~(torch.isfinite(x) & torch.isfinite(y))
        if bool(odd.any()):
            if not torch.equal(x[odd], y[odd]):  # NaN, or an infinity on one side only
                side = "A" if bool((~torch.isfinite(x)).any()) else "B"
                return TensorDifference(*base, error=f"{side} has values that are not finite")
            x, y = x[~odd], y[~odd]  # a mask's infinities, the same in both
            if not x.numel():
                continue
        d = y - x
        sums.signal += float(x.square().sum())
        sums.noise += float(d.square().sum())
        sums.largest = max(sums.largest, float(d.abs().max()))
    if not math.isfinite(sums.signal + sums.noise):
        return TensorDifference(*base, error="squares beyond the range of float64")
    if not sums.largest:
        return TensorDifference(*base, **sums.figures(), identical=True)
    whole.add(sums)
    return TensorDifference(*base, **sums.figures())


def _flat(source: Compound, tensor: TensorFacts) -> Tensor:
    """A weight as one row of numbers."""
    if tensor.is_4bit:
        return dequantize_4bit(*source.read_4bit(tensor.name)).reshape(-1)
    return source.read(tensor.name).reshape(-1)


def _piece(flat: Tensor, start: int) -> Tensor:
    """`_PIECE` elements from `start`, fewer at the end, in float64; of complex numbers both parts."""
    part = flat[start : start + _PIECE]
    if part.is_complex():
        part = torch.view_as_real(part).reshape(-1)
    return part.to(torch.float64)
