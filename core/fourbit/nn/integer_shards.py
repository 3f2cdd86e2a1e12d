"""Parameters of integers in torch's own distributed code before torch 2.13.

FSDP2 and torch's parallel styles make an nn.Parameter of each shard, which asks for a gradient unless told otherwise;
of integers that raises "only Tensors of floating point dtype can require gradients", and FSDP2's mixed precision would
cast them. torch 2.13 passes on what the parameter itself says, and casts numbers alone. In older versions, which change
no more, the modules that do it get an nn.Parameter that asks for no gradient where there can be none.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

NEEDED = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)

_MODULES = (
    "torch.distributed.fsdp._fully_shard._fsdp_param",
    "torch.distributed.fsdp._fully_shard._fsdp_init",
    "torch.distributed.tensor.parallel.style",
    "torch.distributed.tensor._api",
)


class _Meta(type(nn.Parameter)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, nn.Parameter)


class _Parameter(nn.Parameter, metaclass=_Meta):
    def __new__(cls, data: Tensor | None = None, requires_grad: bool = True) -> Any:
        data = torch.empty(0) if data is None else data
        return nn.Parameter(data, requires_grad and (data.is_floating_point() or data.is_complex()))


class _Nn(ModuleType):
    """torch.nn, but for Parameter."""

    Parameter = _Parameter

    def __getattr__(self, name: str) -> Any:
        return getattr(nn, name)


_nn = _Nn("torch.nn")


def allow() -> None:
    """Have those modules, of them that are imported, take integers for what they are."""
    for name in _MODULES:
        module = sys.modules.get(name)
        if module is None or module.__dict__.get("nn") is not nn:
            continue
        module.__dict__["nn"] = _nn
        if hasattr(module, "FSDPParam"):
            _leave_integers(module.FSDPParam)


def _leave_integers(kind: Any) -> None:
    """Have mixed precision cast no integers."""
    before = kind.init_dtype_attrs

    def init_dtype_attrs(self: Any, policy: Any) -> None:
        if not self.sharded_param.is_floating_point():
            policy = replace(policy, param_dtype=None, reduce_dtype=None)
        before(self, policy)

    kind.init_dtype_attrs = init_dtype_attrs
