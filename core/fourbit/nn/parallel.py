"""Tensor parallelism in torch: 4-bit layers whose storage `parallelize_module` has distributed.

torch's ColwiseParallel and RowwiseParallel register DTensors in the place of a module's parameters. A 4-bit layer takes
these for its storage: codes and scales are sharded as they lie, so that state dicts gather to the bytes of one process.
A forward runs on this process's part of the weight, an ordinary packed one (see `Cut`), and the result is a DTensor as
a linear layer of torch gives it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from fourbit.nn import strategies as strategies
from fourbit.nn.cut import Cut
from fourbit.nn.frozen import plain
from fourbit.weight import Weight

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_linear_4bit = torch.ops.fourbit.linear_4bit.default
_float32 = torch.float32
_NESTED = ("nested_scales", "nested_codebook", "nested_offset")


class Layer(Protocol):
    """What is needed of a 4-bit layer."""

    weight_shape: torch.Size
    blocksize: int
    double_quant: bool
    split: Split | None
    _parameters: dict[str, Any]
    _buffers: dict[str, Any]

    def parallel_shape(self) -> tuple[int, int]: ...


@dataclass
class Split:
    """How a layer is distributed over the processes of a mesh of one dimension.

    Attributes:
        mesh: the processes.
        cut: this process's part of the weight; None where each has the whole.
        weight: it, ready for the ops; None if it has to be made anew.
        made_of: the tensors that it was made of, and how often they had been written to.
    """

    mesh: DeviceMesh
    cut: Cut | None
    weight: Weight | None = None
    made_of: tuple[tuple[Tensor, int], ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Split:
        return Split(self.mesh, self.cut)  # processes are not copied, and what is derived is made anew

    def __getstate__(self) -> Any:
        raise TypeError(
            "a 4-bit layer that is distributed over several processes cannot be pickled: take its state dict, whose"
            " DTensors torch.distributed.checkpoint saves"
        )


def register(layer: Layer, name: str, value: DTensor) -> None:
    """Take a DTensor of torch's parallel styles as the word to distribute the layer's storage.

    Its values are those of the layer's own storage, or for "weight" what that stands for.
    """
    mesh, kind = value.device_mesh, type(layer).__name__
    if mesh.ndim != 1 or type(value.placements[0]) not in (Shard, Replicate):
        raise NotImplementedError(f"{kind}: want Shard or Replicate on a mesh of one dimension, got {value.placements}")
    if layer.split is None:
        (placement,) = value.placements
        layer.split = Split(mesh, _cut(layer, placement.dim, mesh) if isinstance(placement, Shard) else None)
    for own in ("qweight", "scales") if name == "weight" else (name,):
        _distribute(layer, own, layer.split, 0)


def divide(layer: Layer, mesh: DeviceMesh, dim: int) -> None:
    """Have each process of `mesh` keep its part of a weight that all hold whole: of the rows (`dim` 0) or columns.

    As torch's parallel styles do it with `src_data_rank=None`, so without communication, and without their hooks.
    """
    layer.split = Split(mesh, _cut(layer, dim, mesh))
    for own in ("qweight", "scales"):
        _distribute(layer, own, layer.split, None)
    bias = layer._parameters.get("bias")
    if bias is not None:
        made = distribute_tensor(bias.detach(), mesh, [Replicate() if dim else Shard(0)], src_data_rank=None)
        layer._parameters["bias"] = nn.Parameter(made, requires_grad=bias.requires_grad)


def _cut(layer: Layer, dim: int, mesh: DeviceMesh) -> Cut:
    shape = layer.parallel_shape()
    if dim and len(layer.weight_shape) > 2:
        raise NotImplementedError(f"{type(layer).__name__} can be divided by experts, Shard(0), got Shard({dim})")
    cut = Cut.of(shape, layer.blocksize, layer.double_quant, dim, mesh.size(), mesh.get_local_rank())
    held = layer._parameters  # flat ones have no rows to divide
    flat = {name: held[name].dim() < len(layer.weight_shape) for name in ("qweight", "scales")}
    return replace(cut, codes=cut.codes and not flat["qweight"], scales=cut.scales and not flat["scales"])


def _distribute(layer: Layer, name: str, split: Split, source: int | None) -> None:
    held = layer._parameters[name]
    if held is None or isinstance(held, DTensor):
        return
    cut = split.cut
    sharded = cut is not None and (cut.codes if name == "qweight" else cut.scales)
    placement = Shard(cut.dim) if cut is not None and sharded else Replicate()
    made = distribute_tensor(plain(held), split.mesh, [placement], src_data_rank=source)
    layer._parameters[name] = nn.Parameter(made, requires_grad=False)


# ---- the weight: this process's part, and the whole ----------------------------------------------------------


@torch.inference_mode(False)  # what is kept a later training may use
@torch.no_grad()
def part(layer: Layer) -> Weight:
    """This process's part of the weight, as the ops take it; made once, and again when the storage has changed."""
    split = layer.split
    assert split is not None
    tensors = _storage(layer)
    made_of = tuple((tensor, 0 if tensor.is_inference() else tensor._version) for tensor in tensors)
    if split.weight is not None and len(made_of) == len(split.made_of):
        pairs = zip(made_of, split.made_of, strict=True)
        if all(new is old and version == then for (new, version), (old, then) in pairs):
            return split.weight
    whole = _weight(layer, tensors)
    split.weight = whole if split.cut is None else split.cut.weight(whole)
    split.made_of = made_of
    return split.weight


@torch.no_grad()
def whole(layer: Layer) -> Weight:
    """The whole weight on each process, which all have to ask for at once."""
    return _weight(layer, [_gathered(tensor) for tensor in _tensors(layer)])


def _tensors(layer: Layer) -> list[Tensor]:
    names = ("codebook", *_NESTED) if layer.double_quant else ("codebook",)
    found = [layer._parameters["qweight"], layer._parameters["scales"], *(layer._buffers[name] for name in names)]
    return [tensor for tensor in found if tensor is not None]


def _storage(layer: Layer) -> list[Tensor]:
    return [t.to_local() if isinstance(t, DTensor) else t for t in _tensors(layer)]


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _weight(layer: Layer, tensors: list[Tensor]) -> Weight:
    codes, scales, codebook, *nested = map(plain, tensors)
    scales = scales if layer.double_quant else scales.view(_float32)
    return Weight(codes, scales, codebook.view(_float32), layer.blocksize, *(t.view(_float32) for t in nested))


def copy_into(own: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor, which each process has, into a part of the storage."""
    if isinstance(own, DTensor):
        tensor = distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    own.copy_(tensor)


# ---- the forward ---------------------------------------------------------------------------------------------


def linear(layer: Layer, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in_features], a DTensor, to [..., out_features], one sharded in its last dimension or to be summed up."""
    split = layer.split
    assert split is not None
    cut, mesh, name = split.cut, split.mesh, type(layer).__name__
    if not isinstance(x, DTensor):
        raise TypeError(
            f"{name}: its weight is distributed over {mesh}, x is an ordinary tensor; parallelize_module gives it"
            " DTensors, DTensor.from_local does it by hand"
        )
    last = x.dim() - 1
    if cut is None:
        if any(isinstance(p, Partial) or (isinstance(p, Shard) and p.dim % x.dim() == last) for p in x.placements):
            x = x.redistribute(placements=[Replicate()])
        gradient = Partial() if any(isinstance(p, Shard) for p in x.placements) else None
        y = _product(x.to_local(), part(layer), layer.weight_shape[0], _local(bias, gradient))
        return _global(y, x, list(x.placements), layer.weight_shape[0])
    wanted = Replicate() if cut.dim == 0 else Shard(last)
    if tuple(x.placements) != (wanted,):
        x = x.redistribute(placements=[wanted])
    if cut.dim == 0:
        local = x.to_local(grad_placements=[Partial()])
        y = _rows(local, layer, cut, _local(bias))
        return _global(y, x, [Shard(last)], layer.weight_shape[0])
    y = _columns(x.to_local(), layer, cut)
    if bias is not None:
        own = _local(bias)
        # it belongs to the sum once; the others add zero, so that each has the gradient
        y = y + (own if cut.part == 0 else own - own.detach())
    return _global(y, x, [Partial()], layer.weight_shape[0])


def entered(x: Tensor, split: Split) -> Tensor:
    """x, which is the same on each process, for what each adds its part to; their gradients are summed up."""
    x = DTensor.from_local(x, split.mesh, [Replicate()], run_check=False)
    return x.to_local(grad_placements=[Partial()])


def summed(y: Tensor, split: Split) -> Tensor:
    """The sum of the processes' parts, on each."""
    y = DTensor.from_local(y, split.mesh, [Partial()], run_check=False)
    return y.redistribute(placements=[Replicate()]).to_local()


def _rows(x: Tensor, layer: Layer, cut: Cut, bias: Tensor | None) -> Tensor:
    """The part's columns of the product."""
    if not (cut.empty or cut.before or cut.after):
        return _product(x, part(layer), cut.size[0], bias)
    if cut.empty:
        y = x @ x.new_empty(x.shape[-1], 0)
    else:
        y = _product(x, part(layer), cut.size[0], None)[..., cut.before : cut.size[0] - cut.after]
    return y if bias is None else y + bias


def _columns(x: Tensor, layer: Layer, cut: Cut) -> Tensor:
    """What the part's columns add to the product."""
    if cut.empty:
        return x @ x.new_empty(0, layer.weight_shape[0])
    if cut.before or cut.after:
        x = nn.functional.pad(x, (cut.before, cut.after))
    return _product(x, part(layer), layer.weight_shape[0], None)


def _product(x: Tensor, weight: Weight, width: int, bias: Tensor | None) -> Tensor:
    y: Tensor = _linear_4bit(x, *weight[:4], width, *weight[4:], bias)
    return y


def _local(bias: Any, gradient: Any = None) -> Any:
    if not isinstance(bias, DTensor):
        return bias
    return bias.to_local(grad_placements=None if gradient is None else [gradient])


def _global(y: Tensor, x: DTensor, placements: list[Any], width: int) -> Tensor:
    """The DTensor of which y is this process's part."""
    shape = torch.Size((*x.shape[:-1], width))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(y, x.device_mesh, placements, run_check=False, shape=shape, stride=stride)
