"""Conv1D4bit: transformers' Conv1D, the linear layer of GPT-2 that holds [in, out], with a frozen 4-bit weight."""

from __future__ import annotations

from contextlib import ExitStack
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fourbit.config import QuantConfig
from fourbit.nn.linear import Linear4bit
from fourbit.nn.packed import fitting, options

if TYPE_CHECKING:
    from typing_extensions import Self


_CONV1D = "transformers.pytorch_utils.Conv1D"  # core imports no transformers: who has one has imported it


class Conv1D4bit(Linear4bit):
    """A Linear4bit in the place of transformers' Conv1D (`nx` columns in, `nf` out, always with a bias).

    It holds the transposed weight, [out, in], as bitsandbytes does under transformers, and files of either hold that.
    To whoever asks (peft, say) it is a linear layer: `weight` is [out, in], and fan_in_fan_out is False.
    """

    replaces = _CONV1D
    kind = "transposed"
    transposed = True

    @classmethod
    def like(cls, replaced: Any, config: QuantConfig, dtype: torch.dtype, device: torch.device) -> Self:
        """An empty one of the same features, with the same bias."""
        columns, rows = replaced.weight.shape
        new = cls(columns, rows, bias=False, compute_dtype=config.compute_dtype, **options(config, dtype, device))
        new.bias = replaced.bias
        return new

    def put(self, parent: nn.Module, name: str, undo: ExitStack) -> None:
        """As any other, and an adapter around it is told that it is a linear layer now."""
        super().put(parent, name, undo)
        _turn(parent, False, undo)

    def leave(self, parent: nn.Module, name: str, new: nn.Module | nn.Parameter, undo: ExitStack) -> None:
        """`put`'s counterpart."""
        super().leave(parent, name, new, undo)
        _turn(parent, True, undo)

    def restored(self, weight: nn.Parameter) -> nn.Module:  # type: ignore[override]  # no nn.Linear, though it was one
        """A Conv1D with that weight, [in, out], and this one's bias, in the weight's dtype."""
        library, _, name = _CONV1D.rpartition(".")
        with torch.device("meta"):
            new: nn.Module = getattr(import_module(library), name)(self.out_features, self.in_features)
        new.weight, new.bias = weight, fitting(self.bias, weight)  # type: ignore[assignment]
        return new


def _turn(parent: nn.Module, fan_in_fan_out: bool, undo: ExitStack) -> None:
    """Tell peft's layer, if `parent` is one, and its parts which way round the weight within it is."""
    if "fan_in_fan_out" not in parent.__dict__:
        return
    for module in parent.modules():
        if "fan_in_fan_out" in module.__dict__:
            undo.callback(setattr, module, "fan_in_fan_out", module.fan_in_fan_out)
            module.fan_in_fan_out = fan_in_fan_out  # type: ignore[assignment]
