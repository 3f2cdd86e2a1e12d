"""PackedModule: a 4-bit layer answers for itself. What it takes the place of, how it is made, and what it runs.

Plans, quantize_model, explain, GPU warm-up and loaders ask it and know no layer by its class: a subclass elsewhere that
says what it `replaces`, how one is made `like` it and what `op` it runs is planned, swapped in, explained, warmed up
and loaded as those of this package are.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fourbit.backend import OpQuery
from fourbit.config import QuantConfig
from fourbit.functional import require_finite
from fourbit.nn.storage import STORAGE, PackedStorage
from fourbit.state import QuantState

if TYPE_CHECKING:
    from typing_extensions import Self

REPLACEMENTS: dict[type | str, type[PackedModule]] = {}
"""Which PackedModule takes the place of the modules of a class, and of a stacked parameter (under nn.Parameter).

A class may stand under its dotted name: of a library that is imported by whoever has such a module, and not here.
"""


class PackedModule(PackedStorage):
    """A module with a frozen 4-bit weight, in the place of a 16-bit one.

    A subclass calls `setup` in its `__init__`, and has `like`, `restored` and `forward`; and `query` and `sample` of
    its own where these do not say what its forward asks and takes.

    Attributes:
        replaces: of the class: whose modules' place it takes, and whose `weight` it quantizes; nn.Parameter: the place
            of a 3-D parameter. To set it registers the class; None: only its maker knows where it belongs. A string is
            the dotted name of the class.
        kind: of the class: what a plan calls such a weight, see `fourbit.plans.layer.Layer`.
        transposed: of the class: whether it holds [out, in] of what is [in, out] in the module that it replaces.
        op: of the class: that its forward runs.
        compute_dtype: that the input is cast to; None: the input's dtype stays.
    """

    replaces: ClassVar[type | str | None] = None
    kind: ClassVar[str] = "declared"
    transposed: ClassVar[bool] = False
    op: ClassVar[str] = "linear_4bit"
    compute_dtype: torch.dtype | None = None

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        declared = cls.__dict__.get("replaces")  # not an inherited one
        if declared is not None:
            REPLACEMENTS[declared] = cls

    @classmethod
    def like(cls, replaced: Any, config: QuantConfig, dtype: torch.dtype, device: torch.device) -> Self:
        """An empty one for the place of `replaced`, with all that this has beside its weight, such as a bias."""
        raise NotImplementedError(f"{cls.__name__} does not say how one is made for the place of another module")

    def restored(self, weight: nn.Parameter) -> nn.Module | nn.Parameter:
        """`like`'s counterpart: the 16-bit module for this one's place, with `weight` and all that this has beside its.

        `weight` is as that module holds it, of a `transposed` class [in, out]; itself where a parameter made place.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say which 16-bit module takes its place")

    @classmethod
    def from_module(
        cls,
        replaced: nn.Module | Tensor,
        config: QuantConfig | None = None,
        name: str = "weight",
        twin: PackedModule | None = None,
    ) -> Self:
        """Quantize the weight of a module, or a parameter, of the class that this one `replaces`.

        Args:
            replaced: on the meta device it gives an empty one.
            config: default QuantConfig().
            name: for the message of NonFiniteError.
            twin: one that has the same weight quantized already: its storage is shared.
        """
        weight = replaced if isinstance(replaced, Tensor) else replaced.get_parameter("weight")
        config = config or QuantConfig()
        if twin is not None:
            new = cls.empty(replaced, replace(config, blocksize=twin.blocksize), weight.dtype, "meta")
            new._parameters.update({n: t for n, t in twin._parameters.items() if n in STORAGE})
            new._buffers.update({n: t for n, t in twin._buffers.items() if n in STORAGE})
            return new
        new = cls.empty(replaced, config, weight.dtype, weight.device)
        if weight.device.type != "meta":
            new.store(cls.as_held(weight, name), name)
        return new

    @classmethod
    def as_held(cls, weight: Tensor, name: str = "weight") -> Tensor:
        """The weight of a module that it replaces as it holds it: of a `transposed` class [out, in].

        Raises NonFiniteError, with `name`, where turning it would hide the place of a NaN.
        """
        if not cls.transposed:
            return weight
        require_finite(weight, name)
        return weight.detach().T.contiguous()

    @classmethod
    def from_state(
        cls,
        packed: Tensor,
        state: QuantState,
        replaced: nn.Module | Tensor,
        name: str = "weight",
        *,
        device: torch.device | str | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> Self:
        """One for the place of `replaced` with a weight that is quantized already, copied to `device` (None: its own).

        The weight is as files have it: of a `transposed` class [out, in].
        Raises ValueError, with `name`, for another shape than that of `replaced`.
        """
        config = QuantConfig(state.quant_type, state.blocksize, state.double_quant, compute_dtype)
        new = cls.empty(replaced, config, state.dtype, packed.device if device is None else device)
        if new.weight_shape != state.shape:
            raise ValueError(f"{name} has shape {list(state.shape)}, the model wants {list(new.weight_shape)}")
        new.load_packed(packed, state)
        return new

    @classmethod
    def empty(cls, replaced: Any, config: QuantConfig, dtype: torch.dtype, device: torch.device | str) -> Self:
        """One without a weight for the place of `replaced`."""
        new = cls.like(replaced, config, dtype, torch.device(device))
        return new.train(replaced.training) if isinstance(replaced, nn.Module) else new

    def put(self, parent: nn.Module, name: str, undo: ExitStack) -> None:
        """Take the place of the module or parameter `name` of `parent`; closing `undo` brings back what was there."""
        for table in (parent._modules, parent._parameters):
            undo.callback(_restore, table, dict(table))
        parent._parameters.pop(name, None)
        parent._modules[name] = self

    def leave(self, parent: nn.Module, name: str, new: nn.Module | nn.Parameter, undo: ExitStack) -> None:
        """`put`'s counterpart: `new` takes this one's place; closing `undo` brings back what was there."""
        for table in (parent._modules, parent._parameters):
            undo.callback(_restore, table, dict(table))
        if isinstance(new, nn.Module):
            parent._modules[name] = new
        else:
            del parent._modules[name]
            parent._parameters[name] = new

    def query(self) -> OpQuery:
        """What its forward asks of the backends, for an input of its own dtype."""
        cut = None if self.split is None else self.split.cut
        return OpQuery(
            op=self.op,
            device=self.qweight.device,
            dtype=self.compute_dtype or self.dtype,
            blocksize=self.blocksize if cut is None else cut.blocksize,
            nested=self.double_quant if cut is None else cut.nested,
        )

    def sample(self, rows: int, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Arguments of forward to warm it up: `rows` rows of zeros, in `dtype` (None: the logical one)."""
        return (torch.zeros(rows, self.weight_shape[-1], dtype=dtype or self.dtype, device=self.qweight.device),)


def class_for(kind: type) -> type[PackedModule] | None:
    """Which class takes the place of modules of this one itself, its bases not asked."""
    return REPLACEMENTS.get(kind) or REPLACEMENTS.get(f"{kind.__module__}.{kind.__qualname__}")


def replacement(owner: nn.Module, leaf: str) -> tuple[type[PackedModule], nn.Module | Tensor] | None:
    """Which class takes the place of the weight `leaf` of `owner`, and what makes place: `owner`, or the parameter.

    None: nothing does. Subclasses of what a PackedModule replaces count as that.
    """
    if leaf == "weight":
        found = next(filter(None, map(class_for, type(owner).__mro__)), None)
        if found is not None:
            return found, owner
    parameter = owner._parameters.get(leaf)
    return (REPLACEMENTS[nn.Parameter], parameter) if parameter is not None and parameter.dim() == 3 else None


def options(config: QuantConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The keyword arguments that every constructor has."""
    names = ("quant_type", "blocksize", "double_quant")
    return {**{name: getattr(config, name) for name in names}, "dtype": dtype, "device": device}


def _restore(table: dict[str, Any], before: dict[str, Any]) -> None:
    table.clear()  # and not only the one entry: the order is that of before
    table.update(before)


def fitting(tensor: nn.Parameter | None, weight: Tensor) -> nn.Parameter | None:
    """A bias as it stands beside `weight` in a 16-bit module: itself, or a copy in the weight's dtype."""
    if tensor is None or tensor.dtype == weight.dtype:
        return tensor
    return nn.Parameter(tensor.detach().to(weight.dtype), tensor.requires_grad)
