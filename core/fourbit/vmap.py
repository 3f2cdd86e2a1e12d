"""The ops under torch.vmap: where the batch is only more rows it is one call, anything else goes one by one.

Registered at torch.func's batching key: a call outside of vmap never comes here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fourbit import checks, ops
from fourbit.operations import OPERATIONS, Operation

Batched = tuple[Any, Any]
"""What a rule returns: the results, and the dimension of each that is the batch."""


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


def _more_rows(op: Callable[..., Any], record: Operation, x: Tensor, dim: int, rest: tuple[Any, ...]) -> Batched:
    """One call, the batch being one more leading dimension of x."""
    if record.rows == "leading" and dim == x.dim() - 1:  # the features' place
        x, dim = x.movedim(dim, 0), 0
    return op(x, *rest), dim


def _more_rows_an_expert(
    op: Callable[..., Any], record: Operation, x: Tensor, dim: int, rest: tuple[Any, ...]
) -> Batched:
    """One call, each row of x followed by the same row of the other samples."""
    offsets, *weight = rest
    x = x.movedim(dim, 1)
    rows, size = x.shape[:2]
    checks.integers(record.name, "offsets", offsets)
    checks.group_offsets(record.name, offsets, x.select(1, 0))  # before they are multiplied
    y: Tensor = op(x.flatten(0, 1), offsets.long() * size, *weight)
    return y.view(rows, size, y.shape[-1]), 1


_AT_ONCE = {"leading": _more_rows, "all": _more_rows, "experts": _more_rows_an_expert}
"""By `Operation.rows`: rows in the leading dimensions of x, in all of them, or grouped by experts."""


def _rule(record: Operation) -> Callable[..., Batched]:
    op = getattr(torch.ops.fourbit, record.name).default
    at_once = None if record.rows is None else _AT_ONCE[record.rows]

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Batched:
        if at_once is not None and not any(isinstance(dim, int) for dim in in_dims[1:]):
            return at_once(op, record, args[0], in_dims[0], args[1:])
        return _one_by_one(op, info.batch_size, in_dims, args)

    return rule


for _op in OPERATIONS.values():
    torch.library.register_vmap(f"fourbit::{_op.name}", _rule(_op), lib=ops.library)
