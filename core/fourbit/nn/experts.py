"""ExpertWeights4bit: the stacked 3-D weights of a mixture of experts, in 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fourbit import autograd
from fourbit.config import QuantConfig
from fourbit.direct import plain, undisturbed
from fourbit.nn.packed import PackedModule, options
from fourbit.nn.prepared import prepared
from fourbit.nn.view import Holder, WeightView

if TYPE_CHECKING:
    from typing_extensions import Self

_compiling = torch.compiler.is_compiling
_calls: dict[str, Callable[..., Tensor]] = {
    name: getattr(torch.ops.fourbit, name).default for name in ("grouped_linear_4bit", "grouped_linear_4bit_grad")
}


class ExpertWeights4bit(PackedModule):
    """Takes the place of a 3-D parameter `[experts, out, in]` (or `[experts, in, out]`) of a model.

    It is quantized as it lies: blocks run along the last dimension, whichever that is, and `forward` takes either
    orientation. The model's own code goes on working: `weights[e]` is a view of one expert's matrix, on which
    `functional.linear` and `@` run without a 16-bit copy, and torch functions on the whole see the
    dequantized tensor (all experts at once: an implementation that loops over experts needs far less memory).
    """

    replaces = nn.Parameter
    kind = "experts"
    op = "grouped_linear_4bit"

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        quant_type: str = "nf4",
        blocksize: int | None = None,
        double_quant: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"ExpertWeights4bit: want a shape [experts, out, in], got {list(shape)}")
        self.setup(tuple(shape), quant_type, blocksize, double_quant, dtype, device)

    @classmethod
    def from_parameter(cls, weight: Tensor, config: QuantConfig | None = None, name: str = "weight") -> Self:
        """Quantize a 3-D tensor; `name` is for the message of NonFiniteError."""
        return cls.from_module(weight, config, name)

    @classmethod
    def like(cls, replaced: Tensor, config: QuantConfig, dtype: torch.dtype, device: torch.device) -> Self:
        """An empty one of the same shape."""
        return cls(tuple(replaced.shape), **options(config, dtype, device))  # type: ignore[arg-type]

    def restored(self, weight: nn.Parameter) -> nn.Parameter:
        """The parameter itself."""
        return weight

    def sample(self, rows: int, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """`rows` rows, all of them the last expert's."""
        offsets = torch.zeros(self.weight_shape[0], dtype=torch.int32, device=self.qweight.device)
        offsets[-1] = rows
        return (*super().sample(rows, dtype), offsets)

    def forward(self, x: Tensor, offsets: Tensor, transposed: bool = False) -> Tensor:
        """Rows of x [T, in], sorted by expert, times each one's matrix: [T, out], zeros after the last offset.

        The weight is [experts, out, in], or with `transposed` [experts, in, out]; `offsets` (int32 or int64
        [experts]) are the ends of the experts' rows. Differentiable in x; see `fourbit.grouped_linear_4bit`.
        """
        count, outer, inner = self.weight_shape
        if transposed:
            outer, inner = inner, outer
        if x.shape[-1:] != (inner,) or offsets.shape != (count,):
            raise ValueError(
                f"ExpertWeights4bit: x {list(x.shape)} and offsets {list(offsets.shape)} do not fit the weight"
                f" [experts, {'in, out' if transposed else 'out, in'}] = {list(self.weight_shape)}"
            )
        if transposed and torch.is_autocast_enabled(x.device.type):
            # which knows the other orientation's op, as one of a product
            x = x.to(torch.get_autocast_dtype(x.device.type))
        op = "grouped_linear_4bit_grad" if transposed else "grouped_linear_4bit"
        if not _compiling() and undisturbed(x) and plain(offsets):
            weight = prepared(self)
            if weight is not None:
                return autograd.grouped(op, x, offsets, weight, outer)
        first, nested = self.packed_weight().flat()
        return _calls[op](x, offsets, *first, outer, *nested)

    def __len__(self) -> int:
        return self.weight_shape[0]

    def __getitem__(self, index: Any) -> Tensor:
        """A view of one expert's weight for an integer (or a 0-d tensor); else a dequantized part."""
        if isinstance(index, Tensor) and index.dim() == 0:
            index = int(index)
        if not isinstance(index, int):
            return self.weight[index]
        count = self.weight_shape[0]
        if not -count <= index < count:
            raise IndexError(f"expert {index} of {count}")
        return WeightView(self._holder(), index % count)

    def _holder(self) -> Holder:
        """Whom views of the weight read and write."""
        return self

    @property
    def weight(self) -> WeightView:
        """See PackedStorage."""
        return WeightView(self._holder())

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Torch functions on the module act on its weight, so that it can stand where a parameter stood."""
        from torch.utils._pytree import tree_map_only

        args, kwargs = tree_map_only(cls, lambda module: module.weight, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":  # as of a parameter: `weights.data = x` and `weights.data += x` requantize
            self.weight.data = value
            return
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
            # shape, device, transpose, …: as of the parameter that it replaces
            return getattr(self.weight, name)
