"""torch.ops.fourbit.*: each record of `operations` as a torch op, with its eager kernel and its fake.

Registered with `Library.define` and `impl` (never `custom_op`, which costs four times as much a call), so
that torch.compile, FakeTensor and export see each op whole. The eager kernels check the arguments and call the
method that the dispatch table holds; hooks are never called. The table is read from the registry's state at each
call, since that state is replaced, never changed. The hot path of `linear_4bit` is in `autograd`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fourbit import checks, registry, scales
from fourbit.dispatch import miss
from fourbit.operations import OPERATIONS, Operation

library = torch.library.Library("fourbit", "DEF")  # type: ignore[no-untyped-call]


def _checked(op: Operation) -> Callable[..., Any]:
    """The op on the arguments of a Backend method: check, look up, run."""
    name, check = op.name, op.check

    def call(*args: Any) -> Any:
        key, checked = check(name, *args)
        run = registry.state.tables[name].get(key) or miss(name, key)
        return run(*checked)

    return call


def _eager(op: Operation) -> Callable[..., Any]:
    """The op's kernel."""
    call, unflatten = checked[op.name], op.unflatten

    def kernel(*args: Any) -> Any:
        return call(*unflatten(*args))

    return kernel


def _double_quantize(*args: Any) -> tuple[Tensor, ...]:
    _, (absmax, code) = OPERATIONS["double_quantize"].check("double_quantize", *args)
    return scales.double_quantize(absmax, code, eager["quantize_blockwise"])


def _fake(op: Operation) -> Callable[..., Any]:
    """The op's fake, after a check that no tensor lies elsewhere: a call with one on the meta device comes here too."""
    names = [argument.split()[1].split("=")[0] for argument in op.flat]

    def fake(*args: Any, **kwargs: Any) -> Any:
        tensors = [(name, t) for name, t in (*zip(names, args, strict=False), *kwargs.items()) if isinstance(t, Tensor)]
        for name, tensor in tensors:
            if tensor.device != tensors[0][1].device:
                # named is the one on meta, since it came by mistake where the rest is real
                other = next((pair for pair in tensors if pair[1].is_meta), (name, tensor))
                rest = next(t for _, t in tensors if t.device != other[1].device)
                checks.wrong_device(op.name, *other, rest.device)
        return op.fake(*op.unflatten(*args, **kwargs))

    return fake


checked = {op.name: _checked(op) for op in OPERATIONS.values() if op.method}
"""The ops past torch's dispatcher, with the arguments of Backend's methods."""

eager = {op.name: _eager(op) for op in OPERATIONS.values() if op.method} | {"double_quantize": _double_quantize}
"""The eager kernels, with the arguments of torch's schemas."""

for _op in OPERATIONS.values():
    library.define(_op.schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    if _op.name != "linear_4bit":  # `autograd` has a faster kernel for it
        library.impl(_op.name, eager[_op.name], "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fourbit::{_op.name}", _fake(_op), lib=library)
