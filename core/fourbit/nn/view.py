"""WeightView: what `module.weight` returns. An ordinary tensor to the reader, the packed weight underneath."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from fourbit.weight import Weight


class Holder(Protocol):
    """What a view needs of the module that holds the packed weight."""

    weight_shape: torch.Size
    dtype: torch.dtype
    qweight: Tensor
    rewrites: int

    def packed_weight(self) -> Weight: ...
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor: ...
    def store(self, w: Tensor, name: str = "weight") -> None: ...
    def _set_dtype(self, dtype: torch.dtype) -> None: ...


aten = torch.ops.aten

MANY_REWRITES = 3
"""An initialization may rewrite a weight once and a merge once; more are merges and unmerges, again and again."""


class RequantizationWarning(UserWarning):
    """A 4-bit weight has been rewritten several times, and each time was rounded to 4 bits anew.

    What that costs, measured on a random weight [1024, 1024] in NF4, blocksize 64, for adapters of 1, 5 and 20 % of the
    weight's norm (double quantization and 16-bit dtypes change no digit): a merge is off by 1.1, 5.2 and 9.2 %, which
    is to say that of an update below the grid's steps next to nothing arrives. After 1, 2 and 5 merges and unmerges
    the weight is off by 0.6, 1.3 and 3.2 % / 4.0, 7.5 and 17 % / 11, 18 and 35 %.
    """


class WeightView(Tensor):
    """A throw-away stand-in for a packed weight, of its logical shape and dtype, without storage of its own.

    - `functional.linear(x, view)`, `x @ view` and `functional.embedding(ids, view)` run on the packed
      weight, differentiably and without a 16-bit copy of it.
    - Any other operation that reads it sees the dequantized weight.
    - In-place operations, `view[i] = x`, `view.data = x` and `copy_` requantize into the module's storage.

    The result of an operation that would alias an ordinary tensor (`view.T`, `view[0]`) is a copy: writing
    to *that* does not reach the module.
    """

    _is_hf_initialized = True  # transformers' initialization must not write through it
    holder: Holder
    expert: int | None

    @staticmethod
    def __new__(cls: type[WeightView], holder: Holder, expert: int | None = None) -> WeightView:
        shape = holder.weight_shape if expert is None else holder.weight_shape[1:]
        view = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=holder.dtype, device=holder.qweight.device, requires_grad=False
        )
        view.holder = holder
        view.expert = expert
        return view

    def __init__(self, holder: Holder, expert: int | None = None) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        part = "" if self.expert is None else f"[{self.expert}]"
        return f"WeightView({list(self.shape)}, {self.dtype}, of {type(self.holder).__name__}{part})"

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as an ordinary tensor."""
        if self.expert is None:
            return self.holder.dequantize(dtype)
        weight = self.holder.packed_weight()
        row = torch.tensor([self.expert], device=weight.packed.device)
        count, size = self.holder.weight_shape[0], self.numel()
        w: Tensor = torch.ops.fourbit.embedding_4bit(
            row, *weight[:4], count, size, self.dtype if dtype is None else dtype, *weight[4:]
        )
        return w.view(self.shape)

    def write(self, w: Tensor) -> None:
        """Requantize the module's storage from an ordinary tensor."""
        if self.expert is None:
            rewrites = self.holder.rewrites + 1
            self.holder.store(w)
            self.holder.rewrites = rewrites
            if rewrites == MANY_REWRITES:
                warnings.warn(
                    f"a 4-bit weight has been rewritten {MANY_REWRITES} times (by merging and unmerging adapters?), and"
                    " is rounded to 4 bits each time: unmerging does not bring back what was there (of an adapter of"
                    " 5 % of the weight, 4, 8 and 17 % error after 1, 2 and 5 times). Leave adapters unmerged, or merge"
                    " into 16 bits: fourbit.dequantize_model(model), then merge_and_unload()",
                    RequantizationWarning,
                    stacklevel=_outside(),
                )
            return
        whole = self.holder.dequantize()
        whole[self.expert] = w
        self.holder.store(whole)

    def _op_weight(self) -> Weight | None:
        """The weight as the ops take it; None if blocks run from one expert into the next."""
        weight = self.holder.packed_weight()
        return weight if self.expert is None else weight.expert(self.expert, self.numel())

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunctionSubclass():  # results are ordinary tensors, not views
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default):
            return WeightView(args[0].holder, args[0].expert)
        if func is aten._to_copy.default and kwargs.get("device") is None:
            return args[0].read(kwargs.get("dtype"))
        written = _written(func, args, kwargs) if func._schema.is_mutable else []
        read: dict[int, Tensor] = {}

        def plain(view: WeightView) -> Tensor:
            return read.setdefault(id(view), view.read())

        args, kwargs = tree_map_only(WeightView, plain, (args, kwargs))
        result = func(*args, **kwargs)
        for view in written:
            view.write(read[id(view)])
        # an in-place op returns its own argument
        for view in written:
            if result is read[id(view)]:
                return view
        return result


def _outside() -> int:
    """The stack level of the first caller that is neither fourbit nor torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("fourbit", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[WeightView]:
    """The views among the arguments that `func` writes to."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        if isinstance(value, WeightView) and argument.alias_info is not None and argument.alias_info.is_write:
            found.append(value)
    return found


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, WeightView) or isinstance(x, WeightView) or isinstance(bias, WeightView):
        return NotImplemented
    op = weight._op_weight()
    if op is None:
        return functional.linear(x, weight.read(x.dtype), bias)
    return torch.ops.fourbit.linear_4bit(x, *op[:4], weight.shape[0], *op[4:], bias)


def _matmul(x: Any, weight: Any) -> Any:
    if not isinstance(weight, WeightView) or isinstance(x, WeightView) or weight.dim() != 2:
        return NotImplemented
    op = weight._op_weight()
    if op is None:
        return torch.matmul(x, weight.read(x.dtype))
    return torch.ops.fourbit.linear_4bit_grad(x, *op[:4], weight.shape[1], *op[4:])


def _embedding(ids: Any, weight: Any, *rest: Any, **options: Any) -> Any:
    max_norm = rest[1] if len(rest) > 1 else options.get("max_norm")
    if not isinstance(weight, WeightView) or weight.dim() != 2 or weight.expert is not None or max_norm is not None:
        return NotImplemented
    op = weight.holder.packed_weight()
    return torch.ops.fourbit.embedding_4bit(ids, *op[:4], *weight.shape, weight.dtype, *op[4:])


def _get_data(view: WeightView) -> Tensor:
    return view  # as an ordinary tensor's, it aliases the weight: `w = module.weight.data; w.copy_(x)` must reach it


def _set_data(view: Any, value: Any) -> Any:
    if not isinstance(view, WeightView):
        return NotImplemented
    if isinstance(value, WeightView):
        if value.holder is view.holder and value.expert == view.expert:
            return None  # what `weight.data += x` assigns after it has written
        value = value.read()
    if value.dtype != view.dtype:  # as an ordinary tensor would take the new one's dtype
        view.holder._set_dtype(value.dtype)
    view.write(value)
    return None


def _set_item(view: Any, index: Any, value: Any) -> Any:
    if not isinstance(view, WeightView):
        return NotImplemented
    whole = view.read()
    whole[index] = value
    view.write(whole)
    return None


def _deepcopy(view: WeightView, memo: Any) -> Tensor:
    return view.read()


_HANDLERS: dict[Any, Callable[..., Any]] = {
    functional.linear: _linear,
    functional.embedding: _embedding,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__setitem__: _set_item,
    Tensor.__deepcopy__: _deepcopy,
    Tensor.data.__get__: _get_data,  # type: ignore[attr-defined]
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
}
