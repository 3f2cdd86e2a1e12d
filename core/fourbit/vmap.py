"""The ops under torch.vmap: where the batch is only more rows it is one call, anything else goes one by one.

Registered at torch.func's batching key: a call outside of vmap never comes here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fourbit import checks, ops

Batched = tuple[Any, Any]
"""What a rule returns: the results, and the dimension of each that is the batch."""

_ROWS = ("linear_4bit", "linear_4bit_grad", "embedding_4bit")
"""Ops whose first argument has rows in any leading dimensions; for the embedding all of them are."""

_GROUPED = ("grouped_linear_4bit", "grouped_linear_4bit_grad")


def _one_by_one(op: Any, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Batched:
    """A call for each sample: also for batches of weights, of which a kernel takes one."""
    if size == 0:
        raise ValueError(f"{op._opname}: vmap over a batch of size 0 has no result to take the shape from")
    calls = []
    for index in range(size):
        pairs = zip(args, in_dims, strict=True)
        calls.append(op(*(a.select(dim, index) if isinstance(dim, int) else a for a, dim in pairs)))
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(torch.stack(parts) for parts in zip(*calls, strict=True)), (0,) * len(calls[0])


def _more_rows(op: Callable[..., Any], name: str, x: Tensor, dim: int, rest: tuple[Any, ...]) -> Batched:
    """One call, the batch being one more leading dimension of x."""
    if name != "embedding_4bit" and dim == x.dim() - 1:  # the features' place
        x, dim = x.movedim(dim, 0), 0
    return op(x, *rest), dim


def _more_rows_an_expert(op: Callable[..., Any], name: str, x: Tensor, dim: int, rest: tuple[Any, ...]) -> Batched:
    """One call, each row of x followed by the same row of the other samples."""
    offsets, *weight = rest
    x = x.movedim(dim, 1)
    rows, size = x.shape[:2]
    checks.integers(name, "offsets", offsets)
    checks.group_offsets(name, offsets, x.select(1, 0))  # before they are multiplied
    y: Tensor = op(x.flatten(0, 1), offsets.long() * size, *weight)
    return y.view(rows, size, y.shape[-1]), 1


def _register(name: str) -> None:
    op = getattr(torch.ops.fourbit, name).default
    at_once = _more_rows if name in _ROWS else _more_rows_an_expert if name in _GROUPED else None

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Batched:
        if at_once is not None and not any(isinstance(dim, int) for dim in in_dims[1:]):
            return at_once(op, name, args[0], in_dims[0], args[1:])
        return _one_by_one(op, info.batch_size, in_dims, args)

    torch.library.register_vmap(f"fourbit::{name}", rule, lib=ops._library)


for _name in ops.SCHEMAS:
    _register(_name)
