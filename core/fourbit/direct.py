"""The products past torch's dispatcher: when that may be, and how they run then.

One trip of an op in Python through it takes 2 µs, a quarter of what forward and backward of torch's own linear take of
the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fourbit import ops, registry
from fourbit.scales import NESTED_BLOCKSIZE
from fourbit.weight import Weight

_Keys = torch._C.DispatchKeySet
_keys_of: Callable[[Tensor], _Keys] = torch._C._dispatch_keys
raw_keys: Callable[[_Keys], int] = _Keys.raw_repr
"""A key set as a number: numbers compare in a fifth of the time."""

_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_function_modes: Callable[[], int] = torch._C._len_torch_function_stack
_transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active
_tracing: Callable[[], object] = torch._C._get_tracing_state
autocasting: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Whether autocast is on for any kind of device."""

_profiling: Callable[[], bool] = torch._C._autograd._profiler_enabled
_Parameter = nn.Parameter
_uint8, _float32 = torch.uint8, torch.float32

# ---- when ---------------------------------------------------------------------------------------------------

_KINDS = ("CPU", "CUDA", "HIP", "XPU", "MPS", "HPU", "PrivateUse1")


def _raw(*names: str) -> int:
    keys = _Keys(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys | _Keys(getattr(torch._C.DispatchKey, name))
    return raw_keys(keys)


PLAIN_CPU = _raw("CPU", "AutogradCPU")
PLAIN = frozenset(_raw(kind, f"Autograd{kind}") for kind in _KINDS)
"""The key set, as a number, of a call whose tensors are all plain ones on one kind of device.

Whatever the dispatcher handles below Autograd adds a key to a call: a negated or conjugated view, zeros without
memory, a dispatch mode, a subclass, a transform of torch.func, a tensor on another kind of device.
"""


def _of_tensors() -> frozenset[int]:
    found = set()
    for kind in _KINDS:
        autocast = [f"Autocast{kind}"] if hasattr(torch._C.DispatchKey, f"Autocast{kind}") else []
        # those made in inference mode are without the second's
        found |= {_raw(kind, *autocast), _raw(kind, *autocast, f"Autograd{kind}", "ADInplaceOrView")}
    return frozenset(found)


_TENSORS = _of_tensors()
"""The key sets of plain tensors themselves, which have keys besides that a call leaves out."""


def plain(tensor: Tensor) -> bool:
    """Whether it is an ordinary tensor with memory, as torch's kernels take it."""
    kind = type(tensor)
    return (kind is Tensor or kind is _Parameter) and raw_keys(_keys_of(tensor)) in _TENSORS


def undisturbed(x: Tensor) -> bool:
    """Whether all that the dispatcher would add to a call with `x`, and other plain tensors on its device, is autograd
    and autocast.

    So it is if nothing else is going on in the thread that it serves. A profiler counts: it wants the op's name.
    """
    kind = type(x)
    return (
        (kind is Tensor or kind is _Parameter)
        and raw_keys(_keys_of(x)) in _TENSORS
        and forward_ad._current_level < 0
        and not (_dispatch_modes() or _function_modes() or _transforming() or _tracing() or _profiling())
    )


# ---- how ----------------------------------------------------------------------------------------------------


def vouch(weight: Weight) -> None:
    """Mark the tensors as contiguous, on one device, and of the sizes and dtypes that fit each other.

    The marks are on the objects, so that whatever a saved-tensor hook gives in place of one is without.
    """
    mark = object()
    for part in (*weight[:3], *weight[4:]):
        if part is not None:
            part._vouched = mark  # type: ignore[attr-defined]


def vouched(weight: Weight) -> bool:
    """Whether they have been marked together."""
    packed, absmax, code, _, a, b, c = weight
    try:
        mark = packed._vouched  # type: ignore[attr-defined]
        if absmax._vouched is not mark or code._vouched is not mark:  # type: ignore[attr-defined]
            return False
        return a is None or a._vouched is b._vouched is c._vouched is mark  # type: ignore[attr-defined, union-attr]
    except AttributeError:
        return False


def method(op: str, x: Tensor, weight: Weight) -> Callable[..., Tensor]:
    """The backend's method that runs it; where that has not been looked up before, the op with its checks."""
    run = registry.state.tables[op].get((x.device, x.dtype, weight[3], weight[4] is not None))
    return run or ops.checked[op]


def product(
    op: str, x: Tensor, weight: Weight, width: int, bias: Tensor | None = None, device: torch.device | None = None
) -> Tensor:
    """`linear_4bit` or its gradient of plain tensors; `device` if all of them are known to lie there."""
    # A hit in the table vouches for dtype and blocksize, one expression for the rest; where that says no, the op's
    # check finds out and says why.
    packed, absmax, code, blocksize, a, b, c = weight
    on = device if device is not None else x.device
    run: Any = None
    count = 0
    try:
        run = registry.state.tables[op][on, x.dtype, blocksize, a is not None]
        count = width * x.shape[-1]
    except (KeyError, IndexError):
        pass
    if (
        not count
        or packed.numel() != (count + 1) >> 1
        or absmax.numel() != -(-count // blocksize)
        or packed.dtype is not _uint8
        or code.numel() != 16
        or code.dtype is not _float32
        or not (device is not None or packed.device == absmax.device == code.device == on)
        or not packed.is_contiguous()
        or not absmax.is_contiguous()
        or not code.is_contiguous()
        or not (bias is None or bias_fits(bias, x, width))
        or (
            (absmax.dtype is not _float32 or b is not None or c is not None)
            if a is None
            else not _nested_fit(absmax, a, b, c, None if device is not None else on)
        )
    ):
        checked: Tensor = ops.checked[op](x, weight, width, bias)
        return checked
    if not x.is_contiguous():
        x = x.contiguous()
    result: Tensor = run(x, weight, width) if bias is None else run(x, weight, width, bias)
    return result


def bias_fits(bias: Tensor, x: Tensor, width: int) -> bool:
    """Whether a bias is surely right, as it is."""
    return bool(bias.shape == (width,) and bias.dtype is x.dtype and bias.device == x.device and bias.is_contiguous())


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
