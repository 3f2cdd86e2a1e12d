"""How DTensor may shard the arguments of fourbit's ops: strategies for torch's own registration.

Layers that are distributed (`fourbit.nn.parallel`) compute on ordinary tensors and need none of them. They are for
programs that call the ops on DTensors: what is sharded in a way that an op has no strategy for is gathered first.
Columns of a product are not among them, as the op's size argument speaks of all. To import this module registers them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from fourbit.operations import OPERATIONS

Placements = list[Any]
Strategies = list[tuple[Placements, Placements]]
"""Acceptable placements of the results and, beside them, of the arguments; None for what is no tensor."""


def _is_tensor(argument: Any) -> bool:
    return hasattr(argument, "placements")


def _replicated(args: tuple[Any, ...], results: int) -> Strategies:
    return [([Replicate()] * results, [Replicate() if _is_tensor(each) else None for each in args])]


def _with(arguments: Placements, **changed: Any) -> Placements:
    """The placements with some changed, by the argument's place in the op (`at0`, `at1`, …)."""
    return [changed.get(f"at{place}", each) for place, each in enumerate(arguments)]


def _by_rows(args: tuple[Any, ...], dimensions: int) -> Strategies:
    """The first argument's leading dimensions are independent of each other."""
    found = _replicated(args, 1)
    ((_, base),) = found
    return found + [([Shard(dim)], _with(base, at0=Shard(dim))) for dim in range(dimensions)]


def _linear(*args: Any) -> Strategies:
    """Rows of x; and its columns with the weight's, where no block and no byte is cut and there is no bias."""
    x, packed, absmax, _, blocksize, *rest = args
    found = _by_rows(args, len(x.shape) - 1)
    inner, parts = x.shape[-1], x.mesh.size()
    plain = not any(_is_tensor(each) for each in rest) and len(packed.shape) == len(absmax.shape) == 2
    if plain and packed.shape[1] * 2 == inner and absmax.shape[1] * blocksize == inner and absmax.shape[1] % parts == 0:
        base = found[0][1]
        found.append(([Partial()], _with(base, at0=Shard(len(x.shape) - 1), at1=Shard(1), at2=Shard(1))))
    return found


def _linear_grad(*args: Any) -> Strategies:
    """Rows of the gradient; and its columns with the weight's rows, where no block is cut."""
    grad, packed, absmax, _, blocksize, inner, *rest = args
    found = _by_rows(args, len(grad.shape) - 1)
    whole = len(packed.shape) == len(absmax.shape) == 2 and absmax.shape[1] * blocksize == inner
    if whole and not any(_is_tensor(each) for each in rest) and packed.shape[0] % grad.mesh.size() == 0:
        base = found[0][1]
        found.append(([Partial()], _with(base, at0=Shard(len(grad.shape) - 1), at1=Shard(0), at2=Shard(0))))
    return found


def _embedding(*args: Any) -> Strategies:
    return _by_rows(args, len(args[0].shape))


_OWN: dict[str, Callable[..., Strategies]] = {
    "linear_4bit": _linear,
    "linear_4bit_grad": _linear_grad,
    "embedding_4bit": _embedding,
}


def _whole(results: int) -> Callable[..., Strategies]:
    return lambda *args: _replicated(args, results)


for _name in OPERATIONS:
    _overload = getattr(torch.ops.fourbit, _name).default
    register_sharding(_overload)(_OWN.get(_name) or _whole(len(_overload._schema.returns)))
