"""Gradients of the ops: to x and bias. The weight is frozen and only its packed form is kept for backward.

Registered at the Autograd key. A call that needs no gradient, on plain tensors with no dispatch mode, goes
straight to the eager kernel: one trip through torch's dispatcher instead of two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fourbit import ops

_below_autograd = torch._C._AutoDispatchBelowAutograd
_modes = torch._C._len_torch_dispatch_stack
_grad_enabled = torch.is_grad_enabled
_linear_eager = ops._linear_4bit
_linear: Callable[..., Tensor] = torch.ops.fourbit.linear_4bit.default
_linear_grad: Callable[..., Tensor] = torch.ops.fourbit.linear_4bit_grad.default
_grouped: Callable[..., Tensor] = torch.ops.fourbit.grouped_linear_4bit.default
_grouped_grad: Callable[..., Tensor] = torch.ops.fourbit.grouped_linear_4bit_grad.default

Weight = tuple[Tensor, Tensor, Tensor, int]
Nested = tuple[Tensor | None, ...]


def _no_views() -> Any:
    """Inside, a backend's reshapes are not recorded as views: a result that is one could not be added to in place."""
    return torch._C._ExcludeDispatchKeyGuard(_view_keys)


_view_keys = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


class _Product(torch.autograd.Function):
    """x times the transposed weight; differentiable any number of times, since its gradient is `_Transposed`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, offsets: Tensor | None, weight: Weight, width: int, nested: Nested
    ) -> Tensor:
        _save(ctx, x, offsets, weight, nested)
        with _below_autograd(), _no_views():
            if offsets is not None:
                return _grouped(x, offsets, *weight, width, *nested)
            return _linear(x, *weight, width, *nested, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        offsets, weight, nested = _saved(ctx)
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = _transposed(grad, offsets, weight, ctx.width, nested)
        if ctx.needs_input_grad[1]:
            to_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return to_x, to_bias, None, None, None, None


class _Transposed(torch.autograd.Function):
    """grad times the weight; its own gradient is `_Product`."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, offsets: Tensor | None, weight: Weight, width: int, nested: Nested) -> Tensor:
        _save(ctx, grad, offsets, weight, nested)
        with _below_autograd(), _no_views():
            if offsets is not None:
                return _grouped_grad(grad, offsets, *weight, width, *nested)
            return _linear_grad(grad, *weight, width, *nested)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        offsets, weight, nested = _saved(ctx)
        to_grad = None
        if ctx.needs_input_grad[0]:
            if offsets is not None:
                to_grad = _grouped(grad, offsets, *weight, ctx.width, *nested)
            else:
                to_grad = _linear(grad, *weight, ctx.width, *nested)
        return to_grad, None, None, None, None


_apply_product: Callable[..., Tensor] = _Product.apply
_apply_transposed: Callable[..., Tensor] = _Transposed.apply


def _save(ctx: Any, x: Tensor, offsets: Tensor | None, weight: Weight, nested: Nested) -> None:
    packed, absmax, code, ctx.blocksize = weight
    ctx.save_for_backward(packed, absmax, code, offsets, *nested)
    ctx.width = x.shape[-1]


def _saved(ctx: Any) -> tuple[Tensor | None, Weight, Nested]:
    packed, absmax, code, offsets, *nested = ctx.saved_tensors
    return offsets, (packed, absmax, code, ctx.blocksize), tuple(nested)


def _transposed(grad: Tensor, offsets: Tensor | None, weight: Weight, width: int, nested: Nested) -> Tensor:
    """grad times the weight, recorded only where a second derivative is asked for."""
    if offsets is not None:
        return _grouped_grad(grad, offsets, *weight, width, *nested)
    return _linear_grad(grad, *weight, width, *nested)


def _linear_autograd(
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
    if (x.requires_grad or (bias is not None and bias.requires_grad)) and _grad_enabled():
        weight, nested = (packed, absmax, code, blocksize), (nested_absmax, nested_code, nested_offset)
        return _apply_product(x, bias, None, weight, out_features, nested)
    if type(x) is Tensor and not _modes():
        return _linear_eager(
            x, packed, absmax, code, blocksize, out_features, nested_absmax, nested_code, nested_offset, bias
        )
    with _below_autograd():
        return _linear(
            x, packed, absmax, code, blocksize, out_features, nested_absmax, nested_code, nested_offset, bias
        )


def _linear_grad_autograd(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    in_features: int,
    *nested: Tensor | None,
) -> Tensor:
    weight = (packed, absmax, code, blocksize)
    if grad.requires_grad and _grad_enabled():
        return _apply_transposed(grad, None, weight, in_features, ops._three(nested))
    with _below_autograd():
        return _linear_grad(grad, *weight, in_features, *nested)


def _grouped_autograd(
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
    if x.requires_grad and _grad_enabled():
        return _apply_product(x, None, offsets, weight, out_features, ops._three(nested))
    with _below_autograd():
        return _grouped(x, offsets, *weight, out_features, *nested)


def _grouped_grad_autograd(
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
    if grad.requires_grad and _grad_enabled():
        return _apply_transposed(grad, offsets, weight, in_features, ops._three(nested))
    with _below_autograd():
        return _grouped_grad(grad, offsets, *weight, in_features, *nested)


ops._library.impl("linear_4bit", _linear_autograd, "Autograd")  # type: ignore[no-untyped-call]
ops._library.impl("linear_4bit_grad", _linear_grad_autograd, "Autograd")  # type: ignore[no-untyped-call]
ops._library.impl("grouped_linear_4bit", _grouped_autograd, "Autograd")  # type: ignore[no-untyped-call]
ops._library.impl("grouped_linear_4bit_grad", _grouped_grad_autograd, "Autograd")  # type: ignore[no-untyped-call]


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
