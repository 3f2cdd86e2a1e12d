"""Linear4bit: a linear layer with a frozen 4-bit weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fourbit import autograd
from fourbit.config import QuantConfig, as_compute_dtype
from fourbit.direct import plain, undisturbed
from fourbit.nn.packed import PackedModule, fitting, options
from fourbit.nn.prepared import prepared

if TYPE_CHECKING:
    from typing_extensions import Self

_compiling = torch.compiler.is_compiling
_linear_4bit = torch.ops.fourbit.linear_4bit.default


class Linear4bit(PackedModule, nn.Linear):  # type: ignore[misc]  # weight is a view, not a Parameter
    """A drop-in replacement for nn.Linear whose weight is frozen and stored in 4 bits.

    Args:
        in_features, out_features, bias: as in nn.Linear.
        quant_type, blocksize, double_quant: see QuantConfig.
        compute_dtype: the input is cast to it and the result back; None follows the input's dtype.
        dtype: logical dtype of `weight`, and of the bias (None: torch's default).
        device: where to put it.

    x [..., in_features] gives [..., out_features]. The gradient flows to x and the bias. A newly made one has
    no weight yet and gives NaN: use `from_linear`, `store` or `load_state_dict`.
    """

    replaces: ClassVar[type | str | None] = nn.Linear
    kind = "linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        quant_type: str = "nf4",
        blocksize: int | None = None,
        double_quant: bool = False,
        compute_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = as_compute_dtype(compute_dtype)
        self.setup((out_features, in_features), quant_type, blocksize, double_quant, dtype, device)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=self.dtype, device=self.qweight.device))

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: QuantConfig | None = None, name: str = "weight") -> Self:
        """Quantize an nn.Linear. Its bias is shared, not copied; `name` is for the message of NonFiniteError."""
        return cls.from_module(linear, config, name)

    @classmethod
    def like(cls, replaced: nn.Linear, config: QuantConfig, dtype: torch.dtype, device: torch.device) -> Self:
        """An empty one of the same features, with the same bias."""
        features = replaced.in_features, replaced.out_features
        new = cls(*features, bias=False, compute_dtype=config.compute_dtype, **options(config, dtype, device))
        new.bias = replaced.bias
        return new

    def restored(self, weight: nn.Parameter) -> nn.Linear:
        """An nn.Linear with that weight and this one's bias, in the weight's dtype."""
        new = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=weight.dtype)
        new.weight, new.bias = weight, fitting(self.bias, weight)  # type: ignore[assignment]
        return new

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] to [..., out_features], in x's dtype."""
        dtype = x.dtype
        compute = self.compute_dtype
        if compute is not None and compute is not dtype:
            x = x.to(compute)
        bias: Tensor | None = self._parameters["bias"]
        if bias is not None and bias.dtype is not x.dtype:
            bias = bias.to(x.dtype)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"Linear4bit: x has shape {list(x.shape)}, want [..., {self.in_features}]")
        y: Tensor | None = None
        if not _compiling() and undisturbed(x) and (bias is None or plain(bias)):
            weight = prepared(self)
            if weight is not None:
                y = autograd.linear(x, weight, self.out_features, bias)
        if y is None:
            packed, absmax, code, blocksize, a, b, c = self.packed_weight()
            y = _linear_4bit(x, packed, absmax, code, blocksize, self.out_features, a, b, c, bias)
        if compute is not None and y.dtype is not dtype:
            y = y.to(dtype)
        return y

    def reset_parameters(self) -> None:
        """Nothing: the weight is frozen, and random bits are no initialization."""

    def extra_repr(self) -> str:
        """As nn.Linear's, and the quantization."""
        compute: Any = "input's" if self.compute_dtype is None else self.compute_dtype
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{super().extra_repr()}, compute_dtype={compute}"
        )
