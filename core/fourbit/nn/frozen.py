"""FrozenTensor: a packed weight's storage, which is bits and not numbers."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils._pytree import tree_leaves, tree_map_only

_plain = torch._C.DisableTorchFunctionSubclass
"""Inside, a FrozenTensor is an ordinary tensor, and so is what comes out."""

_modes = torch._C._len_torch_dispatch_stack

_MOVES = {"copy_", "set_", "zero_", "requires_grad_", "detach_", "share_memory_"}
"""In-place operations that leave bits bits; `copy_` and `set_` from the same dtype, as what sets `.data`."""

_IN_PLACE_OPERATORS = {
    *("__setitem__", "__iadd__", "__isub__", "__imul__", "__imatmul__", "__itruediv__", "__ifloordiv__", "__imod__"),
    *("__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"),
}
_JOINS = {"cat", "concat", "concatenate", "hstack", "vstack", "dstack", "stack"}
_set_data: Callable[..., Any] = Tensor.data.__set__  # type: ignore[attr-defined]

ROUNDINGS = 4
"""Units in the last place by which an average of equal integers, computed in float32 or better, may be off."""

CHUNK = 1 << 20
"""Elements compared at a time."""


class FrozenTensor(Tensor):
    """A parameter, buffer or alias of a module's packed storage: it can be read and moved, not calculated with.

    Whatever reads it gets ordinary tensors. Tensors of its own dtype are copied into it (loading, broadcasts,
    `.to()`), and it can be set to zero. Other ways of writing raise TypeError or, for arithmetic in place,
    RuntimeError: an optimizer's or an average's arithmetic would make another weight of packed codes. One thing is
    let pass, and writes nothing: `copy_` of numbers that are the very integers stored, up to float32's rounding. So
    `torch.optim.swa_utils.AveragedModel` with an `avg_fn`, or with `get_ema_multi_avg_fn`, averages the adapters of
    a model whose frozen weights are equal in both, and refuses one whose are not.

    Aliases (`detach()`, `.data`, views, what `state_dict()` holds) are FrozenTensors; copies (`clone()`, another
    device or dtype) are ordinary, but for `copy.deepcopy`. Pickles hold ordinary tensors.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Any:
        """As nn.Parameter's: a parameter that shares the storage of `data`."""
        made = frozen(data.detach() if type(data) is nn.Parameter else data, parameter=True)
        if isinstance(made, FrozenTensor):
            made.__class__ = cls
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            with _plain():
                return func(*args, **kwargs)
        if _only_reads(func, types):
            return func(*map(_argument, args), **{key: _argument(value) for key, value in kwargs.items()})
        name = _name(func)
        if name == "__get__":  # .shape, .device, .data: no look at the arguments, since modules ask all the time
            with _plain():
                result = func(*args)
                return _freeze_aliases(result, args) if isinstance(result, Tensor) else result
        values = (*args, *kwargs.values())
        for target in _written(name, func, values, kwargs):
            source = next((value for value in values[1:] if hasattr(value, "dtype")), None)
            if not _is_move(name, func, target, source):
                if name == "copy_" and _holds(target, source):
                    return values[0]
                raise _refusal(name, func, target)
            if func == _set_data:
                vars(target).pop("prepared", None)  # it would keep the memory that is being given up
        if name == "view_as" and values[0].nelement() != values[1].nelement():
            raise _refusal(name, func, values[1])  # torch's vector_to_parameters, which cuts by numel()
        if isinstance(func, OpOverload) or _modes() or any(not issubclass(kind, FrozenTensor) for kind in types):
            # compiled graphs, dispatch modes and other tensor classes know ordinary tensors, and themselves
            ordinary, kwargs = tree_map_only(FrozenTensor, plain, (args, kwargs))
            result = func(*ordinary, **kwargs)
            return args[0] if ordinary and result is ordinary[0] else result
        with _plain():
            result = func(*args, **kwargs)
            if name in _JOINS and result.is_floating_point():
                raise TypeError(
                    f"{name}: a packed 4-bit weight is bits, which are no numbers beside others; join the parameters"
                    " that require a gradient, or those that are floating-point"
                )
            if isinstance(result, Tensor | list | tuple):
                return _freeze_aliases(result, values)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = frozen(plain(self).clone(), parameter=isinstance(self, nn.Parameter))
        result: Tensor = memo[id(self)]
        return result

    def __reduce_ex__(self, proto: Any) -> Any:
        return _ordinary(self).__reduce_ex__(proto)  # type: ignore[no-untyped-call]


class _Counted(FrozenTensor):
    """A part of the storage whose parameter says by `numel()` how many of the model's parameters it is.

    So that whoever counts these by it, as transformers, peft and trainers do, finds those of the model, adapted or not.
    `nelement()`, the shape, `nbytes` and all of C++ go by the tensor's own elements; and so does the numel() of what is
    no Parameter: aliases and copies, which state dicts and savers have.
    """

    def stands_for(self) -> int:
        """How many parameters of the model."""
        raise NotImplementedError

    def numel(self) -> int:
        """As above; but of those that DeepSpeed has marked the elements, as it cuts the storage by them."""
        counts = getattr(self, "_is_param", False) and not hasattr(self, "ds_status")  # nn.Parameter's own mark
        return self.stands_for() if counts else self.nelement()


class FrozenCodes(_Counted):
    """The codes of a weight, two a byte, which count for the weight."""

    count: int | None = None
    prepared: Any = None
    """See `fourbit.nn.prepared`."""

    def stands_for(self) -> int:
        """The weight's elements: `count`; or two a byte where a library made the parameter anew."""
        return 2 * self.nelement() if self.count is None else self.count


class FrozenScales(_Counted):
    """The scales of a weight, which are no parameters of the model."""

    def stands_for(self) -> int:
        """None."""
        return 0


def frozen(tensor: Tensor, parameter: bool) -> Tensor:
    """A FrozenTensor over the storage of an ordinary tensor; any other kind (fake, DTensor) stays what it is.

    An nn.Parameter becomes one and stays the same object, as modules may share it.
    """
    if type(tensor) is nn.Parameter:
        tensor.__class__ = FrozenTensor  # type: ignore[assignment]
        tensor._is_param = True  # as nn.Parameter marks those of other classes
        return tensor
    if type(tensor) is not Tensor and not isinstance(tensor, FrozenTensor):
        return nn.Parameter(tensor, requires_grad=False) if parameter else tensor
    with _plain():
        result = _alias(tensor, FrozenTensor)
    if parameter:
        result._is_param = True
    return result


def plain(tensor: Tensor) -> Tensor:
    """An ordinary tensor over the same storage; what is no FrozenTensor stays what it is."""
    if not isinstance(tensor, FrozenTensor):
        return tensor
    with _plain(), torch._C._DisableTorchDispatch():  # a dispatch mode may know ordinary tensors alone
        return tensor.detach()


def _only_reads(func: Any, types: Any) -> bool:
    """Whether `func` is an op that writes to nothing, as compiled graphs call it, and no mode or other class listens.

    They do so for every layer at every step, where a look through all arguments would cost as much as the product.
    """
    if not isinstance(func, OpOverload) or func._schema.is_mutable or _modes():
        return False
    return all(issubclass(kind, FrozenTensor) for kind in types)


def _argument(value: Any) -> Any:
    """`plain` of an op's argument, which may be a list."""
    return [plain(each) for each in value] if isinstance(value, list | tuple) else plain(value)


def _ordinary(tensor: Tensor) -> Tensor:
    alias = plain(tensor)
    return nn.Parameter(alias, requires_grad=False) if isinstance(tensor, nn.Parameter) else alias


def _name(func: Any) -> str:
    schema = getattr(func, "_schema", None)
    return str(func.__name__ if schema is None else schema.name.rsplit("::", 1)[-1])


def _written(name: str, func: Any, values: tuple[Any, ...], kwargs: dict[str, Any]) -> list[FrozenTensor]:
    """The FrozenTensors that `func` writes to: torch's in-place operations end with an underscore."""
    targets = [kwargs.get("out")]
    in_place = name.endswith("_") and not name.endswith("__")
    if in_place or name in _IN_PLACE_OPERATORS or func == _set_data:
        targets.append(values[0])
    return [t for t in tree_leaves(targets) if isinstance(t, FrozenTensor)]


def _is_move(name: str, func: Any, target: FrozenTensor, source: Any) -> bool:
    if func == _set_data or name in ("copy_", "set_"):
        with _plain():
            return source is None or bool(source.dtype == target.dtype)
    return name in _MOVES


def _holds(target: Tensor, source: Any) -> bool:
    """Whether numbers are what `target` holds: exactly if they are integers, else up to a few roundings."""
    with _plain():
        if not isinstance(source, Tensor) or source.shape != target.shape or source.is_meta or target.is_meta:
            return False
        near = 0.0
        if source.is_floating_point():
            near = ROUNDINGS * min(torch.finfo(source.dtype).eps, torch.finfo(torch.float32).eps)
        ours, theirs = target.detach().reshape(-1), source.detach().to(target.device).reshape(-1)
        for start in range(0, ours.nelement(), CHUNK):
            a, b = (part[start : start + CHUNK].double() for part in (ours, theirs))
            if not bool(((a - b).abs() <= a.abs() * near).all()):
                return False
    return True


def _refusal(name: str, func: Any, target: FrozenTensor) -> Exception:
    with _plain():
        what = f"{target.dtype} {list(target.shape)}"
    text = (
        f"{name}: this tensor ({what}) is the storage of a frozen 4-bit weight: bits, which arithmetic would turn into"
        " another weight's; only tensors of its own dtype are copied into it. Work on the parameters that require a"
        " gradient. AveragedModel averages them, and leaves frozen weights alone that are equal in both models, with"
        " avg_fn=get_ema_avg_fn(), avg_fn=get_swa_avg_fn() or multi_avg_fn=get_ema_multi_avg_fn()."
        " To replace a weight, use load_state_dict, or the module's store() or load_packed()."
    )
    # of a TypeError, `p.data += 1` would make `p.data = p.data + 1`
    return TypeError(text) if name in ("copy_", "view_as") or func == _set_data else RuntimeError(text)


def _freeze_aliases(result: Any, values: tuple[Any, ...]) -> Any:
    """`result` with every tensor frozen that shares storage with a FrozenTensor among the arguments."""
    kinds = {_storage(t): type(t) for t in tree_leaves(values) if isinstance(t, FrozenTensor)}
    kinds.pop(None, None)

    def freeze(tensor: Any) -> Any:
        kind = kinds.get(_storage(tensor)) if type(tensor) is Tensor else None
        return tensor if kind is None else _alias(tensor, kind)

    if type(result) in (list, tuple):
        return type(result)(map(freeze, result))
    return freeze(result)


def _alias(tensor: Tensor, kind: type[FrozenTensor]) -> Tensor:
    return Tensor._make_subclass(kind, tensor, False)  # as nn.Parameter's: no view of anything


def _storage(tensor: Tensor) -> int | None:
    """What tells two storages apart; None where there is none: sparse tensors, and those of torch.func's transforms."""
    if tensor.layout is not torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return None
    return int(tensor.untyped_storage()._cdata)


# as torch registers its own tensors and parameters: handles of shared memory, and of CUDA's, instead of copies
for _kind in (FrozenTensor, FrozenCodes, FrozenScales):
    ForkingPickler.register(_kind, lambda tensor: reduce_tensor(_ordinary(tensor)))  # type: ignore[no-untyped-call]
