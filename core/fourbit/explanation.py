"""explain: which backend and path would run an op, and why not the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fourbit import dispatch, plugins, registry
from fourbit.backend import OPS, OpQuery
from fourbit.nn.packed import PackedModule


@dataclass(frozen=True)
class Explanation:
    """The answer of `fourbit.explain`; `print` it, or use its fields.

    Attributes:
        op: the op that was asked about; its device, dtype, blocksize and nesting are in `query`.
        backend: the backend that runs it; None if none does.
        path: how, in the backend's own words.
        rejected: `(backend, reason)` of those asked before it.
        others: `(name, state, reason)` of backends that were found but are not ready.
        error: the full message if no backend runs it.
        part: of a layer that is distributed over processes, which part of the weight this one has, and what of it is
            held otherwise than in the whole.
    """

    query: OpQuery
    backend: str | None
    path: str
    rejected: tuple[tuple[str, str], ...]
    others: tuple[tuple[str, str, str], ...]
    error: str = ""
    part: str = ""

    @property
    def op(self) -> str:
        """The op's name."""
        return self.query.op

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "op": self.query.op,
            "device": str(self.query.device),
            "dtype": str(self.query.dtype).removeprefix("torch."),
            "blocksize": self.query.blocksize,
            "double_quant": self.query.nested,
            "backend": self.backend,
            "path": self.path,
            "part": self.part,
            "rejected": [{"backend": name, "reason": reason} for name, reason in self.rejected],
            "not_ready": [{"backend": n, "state": s, "reason": r} for n, s, r in self.others],
        }

    def __str__(self) -> str:
        lines = [f"{dispatch.format_query(self.query)}: {self.backend or 'NO BACKEND'} ({self.path})"]
        lines += [f"  {self.part}"] if self.part else []
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected]
        lines += [f"  not {name} ({state}): {reason}" for name, state, reason in self.others]
        return "\n".join(lines)


def explain(
    layer_or_op: nn.Module | str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    blocksize: int | None = None,
    double_quant: bool | None = None,
    shape: Sequence[int] = (),
) -> Explanation:
    """Which backend and path would run an op, and why not the others.

    Args:
        layer_or_op: a 4-bit layer, or an op's name such as "linear_4bit". A layer answers for its forward.
        device, dtype, blocksize, double_quant: of the input in question; None takes the layer's own, or for an
            op's name the CPU, float32, the default blocksize and False.
        shape: of the weight, for backends that choose by it.

    Raises ValueError for a name that is no op, TypeError for a module that is no 4-bit layer.
    """
    part = ""
    if isinstance(layer_or_op, PackedModule):
        split = layer_or_op.split
        if split is not None:
            part = f"whole on each of {split.mesh.size()} processes" if split.cut is None else split.cut.words()
            shape = shape or (layer_or_op.weight_shape if split.cut is None else split.cut.size)
        query, shape = layer_or_op.query(), shape or layer_or_op.weight_shape
    elif isinstance(layer_or_op, nn.Module):
        inside = sum(isinstance(m, PackedModule) for m in layer_or_op.modules())
        hint = f"; it has {inside} such layers inside, ask about one of them" if inside else ""
        kind = type(layer_or_op).__name__
        raise TypeError(f"{kind} is not a 4-bit layer of fourbit.nn and runs in plain torch{hint}")
    elif layer_or_op in OPS:
        where = torch.device(device or "cpu")
        size = blocksize or (256 if layer_or_op.endswith("blockwise") else dispatch.default_blocksize(where))
        query = OpQuery(op=layer_or_op, device=where, dtype=torch.float32, blocksize=size)
    else:
        raise ValueError(f"no op {layer_or_op!r}; the ops are {', '.join(OPS)}")
    query = replace(
        query,
        device=torch.device(device or query.device),
        dtype=dtype or query.dtype,
        blocksize=blocksize or query.blocksize,
        nested=query.nested if double_quant is None else double_quant,
    )
    others = tuple((i.name, i.state, i.reason) for i in plugins.backends() if i.state != "ready")
    try:
        found = dispatch.resolve(query)
    except registry.NoBackendError as error:
        return Explanation(query, None, "no backend runs this", (), others, str(error), part)
    path = dispatch.describe(found, tuple(shape))
    return Explanation(query, found.entry.name, path, found.rejected, others, part=part)


__all__ = ["Explanation", "explain"]
