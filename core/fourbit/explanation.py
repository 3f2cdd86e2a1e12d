"""explain: which backend and path would run an op, and why not the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from fourbit import dispatch, registry
from fourbit.backend import OPS, OpQuery


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
    """

    query: OpQuery
    backend: str | None
    path: str
    rejected: tuple[tuple[str, str], ...]
    others: tuple[tuple[str, str, str], ...]
    error: str = ""

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
            "rejected": [{"backend": name, "reason": reason} for name, reason in self.rejected],
            "not_ready": [{"backend": n, "state": s, "reason": r} for n, s, r in self.others],
        }

    def __str__(self) -> str:
        lines = [f"{dispatch.format_query(self.query)}: {self.backend or 'NO BACKEND'} ({self.path})"]
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
    if isinstance(layer_or_op, nn.Module):
        op, known = _of_layer(layer_or_op)
    else:
        op, known = layer_or_op, {}
    if op not in OPS:
        raise ValueError(f"no op {op!r}; the ops are {', '.join(OPS)}")
    where = torch.device(device) if device is not None else known.get("device", torch.device("cpu"))
    size = blocksize or known.get("blocksize") or _default_blocksize(op, where)
    nested = known.get("double_quant", False) if double_quant is None else double_quant
    query = OpQuery(op, where, dtype or known.get("dtype", torch.float32), size, nested)
    others = tuple((i.name, i.state, i.reason) for i in registry.backends() if i.state != "ready")
    try:
        found = dispatch.resolve(query)
    except registry.NoBackendError as error:
        return Explanation(query, None, "no backend runs this", (), others, str(error))
    path = dispatch.describe(found, tuple(shape) or known.get("shape", ()))
    return Explanation(query, found.entry.name, path, found.rejected, others)


def _default_blocksize(op: str, device: torch.device) -> int:
    return 256 if op.endswith("blockwise") else dispatch.default_blocksize(device)


def _of_layer(layer: nn.Module) -> tuple[str, dict[str, Any]]:
    from fourbit.nn import Embedding4bit, ExpertWeights4bit, Linear4bit, PackedModule

    ops = {Linear4bit: "linear_4bit", Embedding4bit: "embedding_4bit", ExpertWeights4bit: "linear_4bit"}
    op = next((name for kind, name in ops.items() if isinstance(layer, kind)), None)
    if not isinstance(layer, PackedModule) or op is None:
        inside = sum(isinstance(m, PackedModule) for m in layer.modules())
        hint = f"; it has {inside} such layers inside, ask about one of them" if inside else ""
        raise TypeError(f"{type(layer).__name__} is not a 4-bit layer of fourbit.nn and runs in plain torch{hint}")
    shape = tuple(layer.weight_shape)
    experts_unaligned = isinstance(layer, ExpertWeights4bit) and prod(shape[1:]) % layer.blocksize
    if experts_unaligned:
        op = "embedding_4bit"  # blocks run across experts: one expert is decoded as a row of the whole
    # an expert's scales are decoded before its linear runs
    nested = layer.double_quant and (op != "linear_4bit" or not isinstance(layer, ExpertWeights4bit))
    return op, {
        "device": layer.qweight.device,
        "dtype": getattr(layer, "compute_dtype", None) or layer.dtype,
        "blocksize": layer.blocksize,
        "double_quant": nested,
        "shape": shape,
    }


__all__ = ["Explanation", "explain"]
