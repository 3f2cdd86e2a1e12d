"""Derivatives of the ops, to x and bias, in both modes. The weight is frozen, and only its packed form is kept.

Registered at the Autograd key. A call that needs no derivative goes straight to the eager kernel if torch's
dispatcher has nothing else to do for it, one trip through the dispatcher instead of two; any other goes through
autograd's Function, which finds out what there is to record.
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

from fourbit import ops, registry
from fourbit.operations import OPERATIONS, Operation
from fourbit.scales import NESTED_BLOCKSIZE
from fourbit.weight import Weight

_below_autograd = torch._C._AutoDispatchBelowAutograd
_grad_enabled = torch.is_grad_enabled
_calls: dict[str, Callable[..., Tensor]] = {name: getattr(torch.ops.fourbit, name).default for name in OPERATIONS}
_uint8, _float32 = torch.uint8, torch.float32
_CPU = torch.device("cpu")
_new = tuple.__new__

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


def _record(*args: Any) -> Tensor:
    """`_Product` of the arguments, at the level of torch.func that this kernel serves."""
    if not _transforming():
        return _apply(*args)
    with enable_single_level_autograd_function():
        return _apply(*args)


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


# Not autograd.Function: under torch.func each level of a transform comes to these kernels by itself, with tensors of
# its own, and wants what autograd does for one level.
class _Product(_SingleLevelFunction):
    """x times a weight, as it is or transposed; differentiable any number of times, since each is the other's gradient.

    `offsets`, and only they, for experts' rows.
    """

    @staticmethod
    def forward(
        ctx: Any, op: Operation, x: Tensor, bias: Tensor | None, offsets: Tensor | None, weight: Weight, width: int
    ) -> Tensor:
        packed, absmax, code, ctx.blocksize, a, b, c = weight
        tensors = (packed, absmax, code, a, b, c, offsets)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.op, ctx.shape, ctx.width = op, x.shape, width
        ctx.set_materialize_grads(False)  # a derivative that is zero comes as None, not as zeros to multiply by
        return _below(_product, op, x, offsets, weight, width, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        to_x = to_bias = None
        if grad is not None and ctx.needs_input_grad[1]:
            to_x = _product(OPERATIONS[ctx.op.transposed], grad, *_saved(ctx), ctx.shape[-1])
        if grad is not None and ctx.needs_input_grad[2]:
            to_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return None, to_x, to_bias, None, None, None

    @staticmethod
    def jvp(ctx: Any, _: None, x: Tensor | None, bias: Tensor | None, *__: None) -> Tensor | None:
        if x is None:
            return None if bias is None else bias.expand(*ctx.shape[:-1], ctx.width)
        product = _product(ctx.op, x, *_saved(ctx), ctx.width)
        return product if bias is None else product + bias


_apply: Callable[..., Tensor] = _Product.apply  # type: ignore[attr-defined]


def _saved(ctx: Any) -> tuple[Tensor | None, Weight]:
    packed, absmax, code, a, b, c, offsets = ctx.saved_tensors
    return offsets, _new(Weight, (packed, absmax, code, ctx.blocksize, a, b, c))


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
    eager: Callable[..., Tensor] = ops.eager[op.name]
    grouped = "offsets" in op.arguments

    def kernel(keys: torch._C.DispatchKeySet, *args: Any) -> Tensor:
        x = args[0]
        if _raw_keys(keys) in _PLAIN and forward_ad._current_level < 0 and not (x.requires_grad and _grad_enabled()):
            return eager(*args)
        x, *offsets, weight, width = op.unflatten(*args)
        return _record(op, x, None, offsets[0] if grouped else None, weight, width)

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
    on_cpu = False
    if keys is not None:
        raw = _raw_keys(keys)
        if (
            raw not in _PLAIN
            or forward_ad._current_level >= 0
            or ((x.requires_grad or (bias is not None and bias.requires_grad)) and _grad_enabled())
        ):
            return _record(_LINEAR, x, bias, None, weight, out_features)
        on_cpu = raw == _PLAIN_CPU  # then all tensors are there
    # A hit in the table vouches for dtype and blocksize, one expression for the rest; where that says no, the eager
    # kernel finds out and says why.
    device = _CPU if on_cpu else x.device
    run: Any = None
    count = 0
    try:
        run = registry.state.tables["linear_4bit"][device, x.dtype, blocksize, nested_absmax is not None]
        count = out_features * x.shape[-1]
    except (KeyError, IndexError):
        pass
    if (
        not count
        or packed.numel() != (count + 1) >> 1
        or absmax.numel() != -(-count // blocksize)
        or packed.dtype is not _uint8
        or code.numel() != 16
        or code.dtype is not _float32
        or not (on_cpu or packed.device == absmax.device == code.device == device)
        or not packed.is_contiguous()
        or not absmax.is_contiguous()
        or not code.is_contiguous()
        or (
            bias is not None
            and not (
                bias.shape == (out_features,)
                and bias.dtype is x.dtype
                and (on_cpu or bias.device == device)
                and bias.is_contiguous()
            )
        )
        or (
            (absmax.dtype is not _float32 or nested_code is not None or nested_offset is not None)
            if nested_absmax is None
            else not _nested_fit(absmax, nested_absmax, nested_code, nested_offset, None if on_cpu else device)
        )
    ):
        return _linear_eager(x, *weight[:4], out_features, *weight[4:], bias)
    if not x.is_contiguous():
        x = x.contiguous()
    result: Tensor = run(x, weight, out_features, bias)
    return result


_LINEAR = OPERATIONS["linear_4bit"]
_linear_eager: Callable[..., Tensor] = ops.eager["linear_4bit"]


def _nested_fit(
    absmax: Tensor,
    nested_absmax: Tensor,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    device: torch.device | None,
) -> bool:
    """Whether nested scales are surely right, as they are; on `device`, if it is given."""
    return (
        nested_code is not None
        and nested_offset is not None
        and absmax.dtype is _uint8
        and nested_absmax.numel() == -(-absmax.numel() // NESTED_BLOCKSIZE)
        and nested_code.numel() == 256
        and nested_offset.numel() == 1
        and nested_absmax.dtype is nested_code.dtype is nested_offset.dtype is _float32
        and (device is None or nested_absmax.device == nested_code.device == nested_offset.device == device)
        and nested_absmax.is_contiguous()
        and nested_code.is_contiguous()
    )


# ---- autocast: as torch's own linear, x and bias are cast to the autocast dtype -----------------------------


def _autocast(op: Operation, device_type: str, keys: torch._C.DispatchKeySet) -> Callable[..., Tensor]:
    call = _calls[op.name]
    cast_at = [index for index, argument in enumerate(op.flat) if argument.split()[1] in ("x", "bias=None")]

    def kernel(*args: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        cast = list(args)
        for index in cast_at:
            if index < len(cast) and cast[index] is not None:
                cast[index] = cast[index].to(dtype)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return call(*cast)

    return kernel


ops.library.impl("linear_4bit", partial(_linear_4bit, None), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
for _op in OPERATIONS.values():
    if _op.transposed is None:
        continue
    _kernel = _linear_4bit if _op is _LINEAR else _differentiable(_op)
    ops.library.impl(_op.name, _kernel, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]
    for _type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")) if _op.autocast else ():
        _keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))
        ops.library.impl(_op.name, _autocast(_op, _type, _keys), _key)  # type: ignore[no-untyped-call]
