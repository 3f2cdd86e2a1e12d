"""Stacked experts in 4 bits that stay in host memory, and come to the device as they are computed with.

`offload_experts(model, device)`, which `FourbitConfig(offload_experts=True)` calls. With few rows (a token or some)
the experts that are hit are copied; with many the stack, on a stream of its own, while the layers before compute.
Nothing of it stays for the backward pass, which fetches again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fourbit.backend import OpQuery
from fourbit.nn import ExpertWeights4bit
from fourbit.nn.frozen import frozen, plain
from fourbit.nn.view import Holder, WeightView
from fourbit.state import QuantState
from fourbit.weight import Weight
from fourbit_transformers.expert_stream import Streamer

Hosted = dict[int, tuple[Tensor, Tensor]]
"""Tensors by their ids, and what they are in host memory."""


def offload_experts(model: nn.Module, device: torch.device | str) -> nn.Module:
    """Keep the stacked 4-bit experts of `model` in host memory, pinned where CUDA is there; compute on `device`.

    All else is left where it is; `model.to(device)` no longer moves the stacks. On the CPU, where there is nothing to
    gain, nothing is done. The stacks work as before: in training (their gradient, checkpointing, adapters), in
    `state_dict()` and saved files. torch.compile breaks its graph at them. Returns the model.

    torch rounds what it pins up to powers of two, a third more for Qwen3-30B-A3B; with
    PYTORCH_ALLOC_CONF=pinned_max_round_threshold_mb:1 in the environment it does not.

    Raises ValueError for stacks without values, on the meta device.
    """
    where = torch.device(device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    if gains(where):
        offload(model, Streamer(where))
    return model


def gains(device: torch.device) -> bool:
    """Whether the device has a memory of its own."""
    return device.type != "cpu"


def offload(model: nn.Module, streamer: Streamer) -> None:
    """The same with a given streamer."""
    stacks = {name: m for name, m in model.named_modules() if isinstance(m, ExpertWeights4bit)}
    for name, stack in stacks.items():
        if stack.qweight.is_meta:
            raise ValueError(f"{name} has no values to offload: it is on the meta device")
    hosted: Hosted = {}
    for place, stack in enumerate(stacks.values()):
        prepare(stack, streamer, place).to_host(hosted)


def prepare(stack: ExpertWeights4bit, streamer: Streamer, place: int = 0) -> OffloadedExperts:
    """Make it one that takes its values, where they come later, from host memory, and leaves them there."""
    stack.__class__ = OffloadedExperts
    assert isinstance(stack, OffloadedExperts)
    stack.place, stack.streamer = place, streamer
    return stack


class OffloadedExperts(ExpertWeights4bit):
    """ExpertWeights4bit whose storage is in host memory, and which computes on the device of its input.

    Attributes:
        streamer: what brings it to its device; shared by the stacks of a model.
        place: its number among them.
        writes: how often its weight was written, in ways of which torch keeps no count.
    """

    streamer: Streamer
    place: int
    writes: int = 0

    def to_host(self, hosted: Hosted) -> None:
        """Move the storage to host memory; `hosted` has what is there already, of stacks that share one storage."""
        pinned = self.streamer.device.type == "cuda" and torch.cuda.is_available()
        tables: tuple[dict[str, Any], dict[str, Any]] = (self._parameters, self._buffers)
        for table in tables:
            for name, tensor in table.items():
                if id(tensor) not in hosted:
                    on_host = plain(tensor).detach().to("cpu")
                    if pinned and not on_host.is_pinned():
                        on_host = _pinned(on_host)
                    hosted[id(tensor)] = tensor, frozen(on_host, parameter=table is tables[0])
                table[name] = hosted[id(tensor)][1]

    # ---- computing ------------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor, offsets: Tensor, transposed: bool = False) -> Tensor:
        """See ExpertWeights4bit."""
        if x.device != self.streamer.device:
            self.streamer = self.streamer.on(x.device)
        if x.device == self.qweight.device and not self.streamer.always:
            return super().forward(x, offsets, transposed)
        count, *sizes = self.weight_shape
        if x.dim() != 2 or x.shape[1] != sizes[0 if transposed else 1] or offsets.shape != (count,):
            raise ValueError(
                f"OffloadedExperts: x {list(x.shape)} and offsets {list(offsets.shape)} do not fit the weight"
                f" {list(self.weight_shape)}{', transposed' if transposed else ''}"
            )
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = _Streamed.apply(x, offsets, self, transposed)  # type: ignore[no-untyped-call]
        return y

    def product(self, x: Tensor, offsets: Tensor, transposed: bool, gradient: bool = False) -> Tensor:
        """What forward computes, and with `gradient` what backward does, without a record for autograd."""
        count, outer, inner = self.weight_shape
        size = outer * inner
        width = inner if transposed else outer
        if x.shape[0] > count // 2 or size % self.blocksize or size % 2:
            weight = self.streamer.fetch(self, gradient)
        else:
            ends = self.streamer.ends(offsets)
            hit = [e for e, end in enumerate(ends) if end > (ends[e - 1] if e else 0)]
            if not hit:
                return x.new_zeros(x.shape[0], width)
            weight = self._experts(hit, size, x.device)
            offsets = offsets[torch.tensor(hit).to(offsets.device)]
        ops = torch.ops.fourbit
        op = ops.grouped_linear_4bit_grad if transposed else ops.grouped_linear_4bit
        y: Tensor = op(x, offsets, *weight[:4], width, *weight[4:])
        return y

    def _experts(self, numbers: list[int], size: int, device: torch.device) -> Weight:
        """Some experts as a stack of their own on the device, their scales decoded."""
        whole = self.packed_weight()
        parts = [part for number in numbers if (part := whole.expert(number, size)) is not None]
        packed = torch.empty(len(parts), size // 2, dtype=torch.uint8, device=device)
        absmax = torch.empty(len(parts), size // self.blocksize, device=device)
        for row, part in enumerate(parts):
            packed[row].copy_(plain(part.packed), non_blocking=True)
            absmax[row].copy_(plain(part.absmax), non_blocking=True)
        return Weight(packed, absmax, plain(whole.code).to(device), self.blocksize)

    def query(self) -> OpQuery:
        """As it runs on its device."""
        return replace(super().query(), device=self.streamer.device)

    def sample(self, rows: int, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """On its device."""
        return tuple(tensor.to(self.streamer.device) for tensor in super().sample(rows, dtype))

    # ---- the weight, for code that reads and writes it --------------------------------------------------

    def _holder(self) -> Holder:
        held: Holder = self.__dict__.setdefault("_on_device", _OnDevice(self))
        return held

    def load_packed(self, packed: Tensor, state: QuantState) -> None:
        """See PackedStorage."""
        super().load_packed(packed, state)
        self.writes += 1

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """On its device."""
        return self._holder().dequantize(dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, WeightView) and getattr(value.holder, "stack", None) is self:
            return  # what `weight += x` assigns after it has been written
        super().__setattr__(name, value)

    # ---- what nn.Module does to tensors -----------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        host = fn(torch.empty(0, dtype=self.dtype))
        there = fn(torch.empty(0, dtype=self.dtype, device=self.streamer.device))
        if host.device.type in ("cpu", "meta"):  # it leaves the storage in host memory, or takes its values away
            super()._apply(fn, recurse)
        self._set_dtype(there.dtype)
        if there.device != self.streamer.device and there.device.type != "meta":
            self.streamer = self.streamer.on(there.device)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not self.qweight.is_meta:
            self.to_host({})


def _pinned(tensor: Tensor) -> Tensor:
    try:
        return tensor.pin_memory()
    except RuntimeError as error:
        warnings.warn(
            f"{tensor.nbytes / 1e6:.0f} MB of packed experts cannot be pinned in host memory, and are slower to copy:"
            f" {str(error).splitlines()[0]}",
            RuntimeWarning,
            stacklevel=2,
        )
        return tensor


class _Streamed(torch.autograd.Function):
    """The product, which keeps no weight for its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, stack: OffloadedExperts, transposed: bool) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.stack, ctx.transposed = stack, transposed
        return stack.product(x, offsets, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (offsets,) = ctx.saved_tensors
        return ctx.stack.product(grad, offsets, not ctx.transposed, gradient=True), None, None, None


class _OnDevice:
    """What views of an offloaded weight hold: they read a copy on the device, and write to host memory."""

    def __init__(self, stack: OffloadedExperts) -> None:
        self.stack = stack
        self.weight_shape = stack.weight_shape

    @property
    def dtype(self) -> torch.dtype:
        """The logical one."""
        return self.stack.dtype

    @property
    def rewrites(self) -> int:
        """See PackedStorage."""
        return self.stack.rewrites

    @rewrites.setter
    def rewrites(self, count: int) -> None:
        self.stack.rewrites = count

    @property
    def qweight(self) -> Tensor:
        """Nothing but the device, for which views ask it."""
        return torch.empty(0, dtype=torch.uint8, device=self.stack.streamer.device)

    def packed_weight(self) -> Weight:
        """The copy."""
        return self.stack.streamer.fetch(self.stack)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole weight on the device."""
        weight = self.packed_weight()
        dtype = self.dtype if dtype is None else dtype
        w: Tensor = torch.ops.fourbit.dequantize_4bit(*weight[:4], self.weight_shape, dtype, *weight[4:])
        return w

    def store(self, w: Tensor, name: str = "weight") -> None:
        """Quantize into the host's storage."""
        self.stack.store(w, name)

    def _set_dtype(self, dtype: torch.dtype) -> None:
        self.stack._set_dtype(dtype)
