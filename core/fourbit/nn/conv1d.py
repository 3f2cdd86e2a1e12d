"""Conv1D4bit: transformers' Conv1D, the linear layer of GPT-2 that holds [in, out], with a frozen 4-bit weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fourbit.config import QuantConfig
from fourbit.nn.linear import Linear4bit
from fourbit.nn.packed import options

if TYPE_CHECKING:
    from typing_extensions import Self


class Conv1D4bit(Linear4bit):
    """A Linear4bit in the place of transformers' Conv1D (`nx` columns in, `nf` out, always with a bias).

    It holds the transposed weight, [out, in], as bitsandbytes does under transformers, and files of either hold that.
    To whoever asks (peft, say) it is a linear layer: `weight` is [out, in], and fan_in_fan_out is False.
    """

    replaces = "transformers.pytorch_utils.Conv1D"  # core imports no transformers
    kind = "transposed"
    transposed = True

    @classmethod
    def like(cls, replaced: Any, config: QuantConfig, dtype: torch.dtype, device: torch.device) -> Self:
        """An empty one of the same features, with the same bias."""
        columns, rows = replaced.weight.shape
        new = cls(columns, rows, bias=False, compute_dtype=config.compute_dtype, **options(config, dtype, device))
        new.bias = replaced.bias
        return new
