"""Derivatives of the ops, to x and bias, in both modes. The weight is frozen, and only its packed form is kept.

Registered at the Autograd key. A call for which torch's dispatcher has nothing else to do goes straight to the
backend, recorded or not, one trip through the dispatcher instead of two, and so does its gradient; any other goes
through the dispatcher again, from within autograd's Function, which finds out what there is to record.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from fourbit import direct, ops
from fourbit.direct import PLAIN, PLAIN_CPU, autocasting, product, raw_keys, undisturbed, vouched
from fourbit.operations import OPERATIONS, Operation
from fourbit.weight import Weight

_below_autograd = torch._C._AutoDispatchBelowAutograd
_grad_enabled = torch.is_grad_enabled
_calls: dict[str, Callable[..., Tensor]] = {name: getattr(torch.ops.fourbit, name).default for name in OPERATIONS}
_new = tuple.__new__
_CPU = torch.device("cpu")

_excluded: Callable[[torch._C.DispatchKey], bool] = torch._C._dispatch_tls_is_dispatch_key_excluded
_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality
_transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active
_view_keys = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)

_Call = tuple[Operation, Tensor | None, Weight, int, Callable[..., Tensor] | None]
"""What x is multiplied by: the op, offsets, weight and width, and what runs it past the dispatcher, if that may be."""


def _below(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """`function(*args)` with autograd done: what `forward` of a Function calls."""
    # a backend's reshapes are not recorded as views: a result that is one could not be added to in place
    with _below_autograd(), torch._C._ExcludeDispatchKeyGuard(_view_keys):
        if not _transforming():
            return function(*args)
        # forward runs with both modes off, which would hold for the transforms around this one too
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return function(*args)


def _record(x: Tensor, bias: Tensor | None, call: _Call) -> Tensor:
    """`_Product` of the arguments, at the level of torch.func that this kernel serves."""
    if not _transforming():
        return _apply(x, bias, call)
    with enable_single_level_autograd_function():
        return _apply(x, bias, call)


# Not autograd.Function: under torch.func each level of a transform comes to these kernels by itself, with tensors of
# its own, and wants what autograd does for one level.
class _Product(_SingleLevelFunction):
    """x times a weight, as it is or transposed; differentiable any number of times, since each is the other's gradient.

    With offsets, and only with them, for experts' rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, call: _Call) -> Tensor:
        op, offsets, weight, width, run = call
        packed, absmax, code, blocksize, a, b, c = weight
        ctx.facts = op, x.shape, blocksize, width
        ctx.set_materialize_grads(False)  # a derivative that is zero comes as None, not as zeros to multiply by
        if run is not None and a is None and offsets is None:
            ctx.save_for_backward(packed, absmax, code)
        else:
            ctx.save_for_backward(packed, absmax, code, a, b, c, offsets)
        if run is None:
            ctx.save_for_forward(packed, absmax, code, a, b, c, offsets)
            return _below(_product, op, x, offsets, weight, width, bias)
        if not x.is_contiguous():
            x = x.contiguous()
        y = run(x, weight, width, bias) if offsets is None else run(x, offsets, weight, width)
        return _below(y.view, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        to_x = to_bias = None
        if grad is not None:
            needs_x, needs_bias, _ = ctx.needs_input_grad
            if needs_x:
                to_x = _gradient(ctx, grad)
            if needs_bias:
                to_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return to_x, to_bias, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, bias: Tensor | None, _: None) -> Tensor | None:
        op, shape, _, width = ctx.facts
        if x is None:
            return None if bias is None else bias.expand(*shape[:-1], width)
        along = _product(op, x, *_saved(ctx), width)
        return along if bias is None else along + bias


_apply: Callable[..., Tensor] = _Product.apply  # type: ignore[attr-defined]


# What the engine calls: torch's own wrapper would first look up which of two names the function has.
if hasattr(_Product, "_backward_cls"):
    _Product._backward_cls.apply = _Product.backward  # type: ignore[attr-defined]


def _saved(ctx: Any) -> tuple[Tensor | None, Weight]:
    saved = ctx.saved_tensors
    blocksize = ctx.facts[2]
    if len(saved) == 3:
        packed, absmax, code = saved
        return None, _new(Weight, (packed, absmax, code, blocksize, None, None, None))
    packed, absmax, code, a, b, c, offsets = saved
    return offsets, _new(Weight, (packed, absmax, code, blocksize, a, b, c))


def _gradient(ctx: Any, grad: Tensor) -> Tensor:
    op, shape, _, _ = ctx.facts
    offsets, weight = _saved(ctx)
    name, width = op.transposed, shape[-1]
    if _grad_enabled() or not undisturbed(grad) or (OPERATIONS[name].autocast and autocasting()):
        return _product(OPERATIONS[name], grad, offsets, weight, width)
    if offsets is not None:
        result: Tensor = ops.checked[name](grad, offsets, weight, width)
        return result
    if not vouched(weight):
        return product(name, grad, weight, width)
    run = direct.method(name, grad, weight)
    return run(grad if grad.is_contiguous() else grad.contiguous(), weight, width)


def _product(
    op: Operation, x: Tensor, offsets: Tensor | None, weight: Weight, width: int, bias: Tensor | None = None
) -> Tensor:
    """The op itself, through torch's dispatcher."""
    call = _calls[op.name]
    packed, absmax, code, blocksize, a, b, c = weight
    if offsets is not None:
        return call(x, offsets, packed, absmax, code, blocksize, width, a, b, c)
    if bias is not None:
        return call(x, packed, absmax, code, blocksize, width, a, b, c, bias)
    if a is not None:
        return call(x, packed, absmax, code, blocksize, width, a, b, c)
    return call(x, packed, absmax, code, blocksize, width)  # fewer arguments, a third of a microsecond less


def _differentiable(op: Operation) -> Callable[..., Tensor]:
    """The kernel of a product at the Autograd key."""
    run: Callable[..., Tensor] = ops.checked[op.name]
    grouped = "offsets" in op.arguments

    def kernel(keys: torch._C.DispatchKeySet, *args: Any) -> Tensor:
        plain = raw_keys(keys) in PLAIN and forward_ad._current_level < 0
        args = op.unflatten(*args)
        x = args[0]
        if plain and not (x.requires_grad and _grad_enabled()):
            return run(*args)
        _, *offsets, weight, width = args
        return _record(x, None, (op, offsets[0] if grouped else None, weight, width, run if plain else None))

    return kernel


# ---- linear_4bit: the hot path ------------------------------------------------------------------------------


def _linear_4bit(
    keys: torch._C.DispatchKeySet | None,
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
    """The kernel at the Autograd key, and with `keys` None the one below it."""
    weight = _new(Weight, (packed, absmax, code, blocksize, nested_absmax, nested_code, nested_offset))
    device = None
    if keys is not None:
        raw = raw_keys(keys)
        if raw not in PLAIN or forward_ad._current_level >= 0:
            return _record(x, bias, (_LINEAR, None, weight, out_features, None))
        if raw == PLAIN_CPU:
            device = _CPU
        if (x.requires_grad or (bias is not None and bias.requires_grad)) and _grad_enabled():
            return _apply(x, bias, (_LINEAR, None, weight, out_features, _product_of[device is not None]))
    return product("linear_4bit", x, weight, out_features, bias, device)


_LINEAR = OPERATIONS["linear_4bit"]
_checked_linear: Callable[..., Tensor] = ops.checked["linear_4bit"]
_product_of = (partial(product, "linear_4bit"), partial(product, "linear_4bit", device=_CPU))
"""Of tensors on any device, and of such as are known to lie on the CPU."""

# ---- what layers call where nothing is going on that the dispatcher serves ----------------------------------


def linear(x: Tensor, weight: Weight, out_features: int, bias: Tensor | None) -> Tensor | None:
    """`linear_4bit` past the dispatcher, of a weight that is vouched for; None if that is not on x's device.

    The caller knows that x is `undisturbed` and the bias plain.
    """
    if autocasting():
        x, bias = _cast(x), bias if bias is None else _cast(bias)
    if x.device != weight[0].device:
        return None
    if bias is None or direct.bias_fits(bias, x, out_features):
        run = direct.method("linear_4bit", x, weight)
    else:
        run = _checked_linear
    if (x.requires_grad or (bias is not None and bias.requires_grad)) and _grad_enabled() and not _excluded(_AUTOGRAD):
        return _apply(x, bias, (_LINEAR, None, weight, out_features, run))
    return run(x if x.is_contiguous() else x.contiguous(), weight, out_features, bias)


def grouped(name: str, x: Tensor, offsets: Tensor, weight: Weight, width: int) -> Tensor:
    """`grouped_linear_4bit` or its gradient, likewise."""
    if OPERATIONS[name].autocast and autocasting():
        x = _cast(x)
    run: Callable[..., Tensor] = ops.checked[name]
    if x.requires_grad and _grad_enabled() and not _excluded(_AUTOGRAD):
        return _apply(x, None, (OPERATIONS[name], offsets, weight, width, run))
    return run(x, offsets, weight, width)


# ---- autocast: as torch's own linear, x and bias are cast to the autocast dtype -----------------------------

_AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
"""Kinds of devices, and torch's key of each."""


def _cast(tensor: Tensor) -> Tensor:
    """To the autocast dtype of the device that it is on, if autocast is on for that."""
    kind = tensor.device.type
    if kind in _AUTOCAST and torch.is_autocast_enabled(kind):
        return tensor.to(torch.get_autocast_dtype(kind))
    return tensor


def _autocast(op: Operation, keys: torch._C.DispatchKeySet) -> Callable[..., Tensor]:
    call = _calls[op.name]
    cast_at = [index for index, argument in enumerate(op.flat) if argument.split()[1] in ("x", "bias=None")]

    def kernel(*args: Any) -> Tensor:
        cast = list(args)
        for index in cast_at:
            if index < len(cast) and cast[index] is not None:
                cast[index] = _cast(cast[index])
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return call(*cast)

    return kernel


ops.library.impl("linear_4bit", partial(_linear_4bit, None), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
for _op in OPERATIONS.values():
    if _op.transposed is None:
        continue
    _kernel = _linear_4bit if _op is _LINEAR else _differentiable(_op)
    ops.library.impl(_op.name, _kernel, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]
    for _key in _AUTOCAST.values() if _op.autocast else ():
        _keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))
        ops.library.impl(_op.name, _autocast(_op, _keys), _key)  # type: ignore[no-untyped-call]
