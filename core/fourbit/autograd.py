"""Derivatives of the ops, to x and bias, in both modes. The weight is frozen, and only its packed form is kept.

Registered at the Autograd key. A call that needs no derivative goes straight to the eager kernel if torch's
dispatcher has nothing else to do for it, one trip through the dispatcher instead of two; any other goes through
autograd's Function, which finds out what there is to record.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from fourbit import ops

_below_autograd = torch._C._AutoDispatchBelowAutograd
_grad_enabled = torch.is_grad_enabled
_linear_eager = ops._linear_4bit
_linear: Callable[..., Tensor] = torch.ops.fourbit.linear_4bit.default
_linear_grad: Callable[..., Tensor] = torch.ops.fourbit.linear_4bit_grad.default
_grouped: Callable[..., Tensor] = torch.ops.fourbit.grouped_linear_4bit.default
_grouped_grad: Callable[..., Tensor] = torch.ops.fourbit.grouped_linear_4bit_grad.default

Weight = tuple[Tensor, Tensor, Tensor, int]
Nested = tuple[Tensor | None, ...]


_transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active
_view_keys = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def _below(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """`function(*args)` with autograd done: what `forward` of a Function calls."""
    # a backend's reshapes are not recorded as views: a result that is one could not be added to in place
    with _below_autograd(), torch._C._ExcludeDispatchKeyGuard(_view_keys):
        if not _transforming():
            return function(*args)
        # forward runs with both modes off, which would hold for the transforms around this one too
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return function(*args)


def _record(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """`function(*args)`, function being `apply` of a Function, at the level of torch.func that this kernel serves."""
    if not _transforming():
        return function(*args)
    with enable_single_level_autograd_function():
        return function(*args)


def _plain_keys(kind: str) -> int:
    """The key set, as a number, of a call whose tensors are all plain ones on one kind of device."""
    keys = torch._C.DispatchKey
    of = torch._C.DispatchKeySet
    return _raw_keys(of(getattr(keys, kind)) | of(getattr(keys, f"Autograd{kind}")))


_raw_keys: Callable[[torch._C.DispatchKeySet], int] = torch._C.DispatchKeySet.raw_repr
_PLAIN_CPU = _plain_keys("CPU")
_PLAIN = frozenset(_plain_keys(kind) for kind in ("CPU", "CUDA", "HIP", "XPU", "MPS", "HPU", "PrivateUse1"))
"""Whatever the dispatcher handles below Autograd adds a key to a call: a negated or conjugated view, zeros without
memory, a dispatch mode, a subclass, a transform of torch.func, a tensor on another kind of device."""


def _is_plain(keys: torch._C.DispatchKeySet, x: Tensor) -> bool:
    """Whether there is nothing to do for a call but to run its kernel; `x` alone may need a derivative."""
    if forward_ad._current_level >= 0 or (x.requires_grad and _grad_enabled()):
        return False
    return _raw_keys(keys) in _PLAIN


# Not autograd.Function: under torch.func each level of a transform comes to these kernels by itself, with tensors of
# its own, and wants what autograd does for one level.
class _Product(_SingleLevelFunction):
    """x times the transposed weight; differentiable any number of times, since its gradient is `_Transposed`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, offsets: Tensor | None, weight: Weight, width: int, nested: Nested
    ) -> Tensor:
        _save(ctx, x, offsets, weight, nested)
        ctx.out_features = width
        return _below(_product, x, offsets, weight, width, nested, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        to_x = to_bias = None
        if grad is not None and ctx.needs_input_grad[0]:
            offsets, weight, nested = _saved(ctx)
            to_x = _transposed(grad, offsets, weight, ctx.shape[-1], nested)
        if grad is not None and ctx.needs_input_grad[1]:
            to_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return to_x, to_bias, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, bias: Tensor | None, *_: None) -> Tensor | None:
        if x is None:
            return None if bias is None else bias.expand(*ctx.shape[:-1], ctx.out_features)
        offsets, weight, nested = _saved(ctx)
        product = _product(x, offsets, weight, ctx.out_features, nested)
        return product if bias is None else product + bias


class _Transposed(_SingleLevelFunction):
    """grad times the weight; its own gradient is `_Product`."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, offsets: Tensor | None, weight: Weight, width: int, nested: Nested) -> Tensor:
        _save(ctx, grad, offsets, weight, nested)
        ctx.in_features = width
        return _below(_transposed, grad, offsets, weight, width, nested)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        to_grad = None
        if grad is not None and ctx.needs_input_grad[0]:
            offsets, weight, nested = _saved(ctx)
            to_grad = _product(grad, offsets, weight, ctx.shape[-1], nested)
        return to_grad, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, grad: Tensor | None, *_: None) -> Tensor | None:
        if grad is None:
            return None
        offsets, weight, nested = _saved(ctx)
        return _transposed(grad, offsets, weight, ctx.in_features, nested)


_apply_product: Callable[..., Tensor] = _Product.apply  # type: ignore[attr-defined]
_apply_transposed: Callable[..., Tensor] = _Transposed.apply  # type: ignore[attr-defined]


def _save(ctx: Any, x: Tensor, offsets: Tensor | None, weight: Weight, nested: Nested) -> None:
    packed, absmax, code, ctx.blocksize = weight
    tensors = (packed, absmax, code, offsets, *nested)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.shape = x.shape
    ctx.set_materialize_grads(False)  # a derivative that is zero comes as None, not as zeros to multiply by


def _saved(ctx: Any) -> tuple[Tensor | None, Weight, Nested]:
    packed, absmax, code, offsets, *nested = ctx.saved_tensors
    return offsets, (packed, absmax, code, ctx.blocksize), tuple(nested)


def _product(
    x: Tensor, offsets: Tensor | None, weight: Weight, width: int, nested: Nested, bias: Tensor | None = None
) -> Tensor:
    """x times the transposed weight, or each expert's rows times its own."""
    if offsets is not None:
        return _grouped(x, offsets, *weight, width, *nested)
    return _linear(x, *weight, width, *nested, bias)


def _transposed(grad: Tensor, offsets: Tensor | None, weight: Weight, width: int, nested: Nested) -> Tensor:
    """grad times the weight, or each expert's rows times its own."""
    if offsets is not None:
        return _grouped_grad(grad, offsets, *weight, width, *nested)
    return _linear_grad(grad, *weight, width, *nested)


def _linear_autograd(
    keys: torch._C.DispatchKeySet,
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    out_features: int,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    # `_is_plain` written out: this is the hot path
    raw = _raw_keys(keys)
    if (
        raw in _PLAIN
        and forward_ad._current_level < 0
        and not ((x.requires_grad or (bias is not None and bias.requires_grad)) and _grad_enabled())
    ):
        # fmt: off
        return _linear_eager(
            x, packed, absmax, code, blocksize, out_features, nested_absmax, nested_code, nested_offset, bias,
            raw == _PLAIN_CPU,
        )
        # fmt: on
    weight, nested = (packed, absmax, code, blocksize), (nested_absmax, nested_code, nested_offset)
    return _record(_apply_product, x, bias, None, weight, out_features, nested)


def _linear_grad_autograd(
    keys: torch._C.DispatchKeySet,
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    in_features: int,
    *nested: Tensor | None,
) -> Tensor:
    weight = (packed, absmax, code, blocksize)
    if _is_plain(keys, grad):
        return ops._linear_4bit_grad(grad, *weight, in_features, *nested)
    return _record(_apply_transposed, grad, None, weight, in_features, ops._three(nested))


def _grouped_autograd(
    keys: torch._C.DispatchKeySet,
    x: Tensor,
    offsets: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    out_features: int,
    *nested: Tensor | None,
) -> Tensor:
    weight = (packed, absmax, code, blocksize)
    if _is_plain(keys, x):
        return ops._grouped_linear_4bit(x, offsets, *weight, out_features, *nested)
    return _record(_apply_product, x, None, offsets, weight, out_features, ops._three(nested))


def _grouped_grad_autograd(
    keys: torch._C.DispatchKeySet,
    grad: Tensor,
    offsets: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    in_features: int,
    *nested: Tensor | None,
) -> Tensor:
    weight = (packed, absmax, code, blocksize)
    if _is_plain(keys, grad):
        return ops._grouped_linear_4bit_grad(grad, offsets, *weight, in_features, *nested)
    return _record(_apply_transposed, grad, offsets, weight, in_features, ops._three(nested))


for _name, _kernel in (
    ("linear_4bit", _linear_autograd),
    ("linear_4bit_grad", _linear_grad_autograd),
    ("grouped_linear_4bit", _grouped_autograd),
    ("grouped_linear_4bit_grad", _grouped_grad_autograd),
):
    ops._library.impl(_name, _kernel, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


# ---- autocast: as torch's own linear, x and bias are cast to the autocast dtype -----------------------------


def _register_autocast(device_type: str, key: str) -> None:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def linear(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        *rest, bias = args if len(args) == 9 else (*args, kwargs.pop("bias", None))
        if bias is not None:
            kwargs["bias"] = bias.to(dtype)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return _linear(x.to(dtype), *rest, **kwargs)

    def grouped(x: Tensor, *args: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return _grouped(x.to(torch.get_autocast_dtype(device_type)), *args)

    ops._library.impl("linear_4bit", linear, key)  # type: ignore[no-untyped-call]
    ops._library.impl("grouped_linear_4bit", grouped, key)  # type: ignore[no-untyped-call]


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
