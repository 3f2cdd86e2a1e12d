"""Copies of packed stacks on a device, made from host memory while the device computes."""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock
from typing import Any, NamedTuple, Protocol
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from fourbit.nn.frozen import plain
from fourbit.weight import Weight


class Stack(Protocol):
    """What is needed of a stack in host memory. `place` tells it from others, `writes` its weight from former ones."""

    place: int
    writes: int
    qweight: Tensor
    scales: Tensor

    def packed_weight(self) -> Weight: ...


KEPT = 4
"""Copies that are kept: those of two layers, that with the next one's may be on its way while one computes, forward
and again for its gradient."""


class _Request(NamedTuple):
    """Whose copy was asked for: of which stack, for a gradient, and inside a backward pass (as recomputed layers)."""

    place: int
    gradient: bool
    inside: bool


class _Copy:
    """A weight on the device, on its way there or arrived."""

    def __init__(self, weight: Weight, identity: Any, stream: Any, arrived: Any) -> None:
        self.weight = weight
        self.identity = identity
        self._stream = stream
        self._arrived = arrived

    def __del__(self) -> None:
        if self._arrived is not None:  # its memory is not given away while it is still written to
            self._stream.wait_event(self._arrived)

    def wait(self) -> None:
        """Have what is launched from here on find it arrived."""
        if self._arrived is None:
            return
        current = torch.cuda.current_stream(self.weight.packed.device)
        current.wait_event(self._arrived)
        if current != self._stream:  # nor while this one reads it
            for tensor in self.weight:
                if isinstance(tensor, Tensor):
                    tensor.record_stream(current)


class Streamer:
    """Brings stacks to one device, for all layers of a model.

    It learns which request follows which, and has the next stack copied on a stream of its own while the present one
    is computed with. A guess that fails costs time, never a result. What is copied is allocated in the stream that
    computes, so that memory of past copies is used again in order.

    Attributes:
        device: where the copies are.
        always: whether it copies also where the stacks are already, on the CPU.
    """

    def __init__(self, device: torch.device, always: bool = False) -> None:
        self.device = device
        self.always = always
        self._others: dict[torch.device, Streamer] = {device: self}
        self._side: Any = None
        self._copies: dict[int, _Copy] = {}
        self._stacks: dict[int, ReferenceType[Stack]] = {}
        self._after: dict[_Request, _Request] = {}
        self._last: _Request | None = None
        self._ends: tuple[ReferenceType[Tensor] | None, list[int]] = (None, [])
        self._lock = RLock()  # gradients are computed on another thread

    def __reduce__(self) -> Any:
        return Streamer, (self.device, self.always)  # copies of a model have copies of their own

    def on(self, device: torch.device) -> Streamer:
        """The one for another device, which is one for all stacks, too."""
        if device not in self._others:
            other = Streamer(device)
            other._others = self._others
            self._others[device] = other
        return self._others[device]

    def fetch(self, stack: Stack, gradient: bool = False) -> Weight:
        """The weight of `stack` on the device."""
        with self._lock:
            request = _Request(stack.place, gradient, torch._C._current_graph_task_id() != -1)
            if self._last is not None:
                self._after[self._last] = request
            self._last = request
            self._stacks[stack.place] = ref(stack)
            copy = self._copies.pop(stack.place, None)
            if copy is None or copy.identity != _identity(stack):
                copy = self._start(stack)
            self._copies[stack.place] = copy  # the latest now
            copy.wait()
            self._start_next(request)
            while len(self._copies) > KEPT:
                del self._copies[next(iter(self._copies))]
            return copy.weight

    def ends(self, offsets: Tensor) -> list[int]:
        """`offsets` as numbers of the host, for which it waits. Both projections of a layer ask."""
        known, ends = self._ends
        if known is None or known() is not offsets:
            ends = offsets.tolist()
            self._ends = ref(offsets), ends
        return ends

    def _start_next(self, request: _Request) -> None:
        for _ in range(KEPT - 1):
            following = self._after.get(request)
            if following is None and not request.gradient and not request.inside:
                following = request._replace(place=request.place + 1)
            if following is None:
                return
            request = following
            if request.place not in self._copies:
                stack = self._stacks[request.place]() if request.place in self._stacks else None
                if stack is not None:
                    self._copies[request.place] = self._start(stack)
                return

    def _start(self, stack: Stack) -> _Copy:
        host, identity = stack.packed_weight(), _identity(stack)
        if self.device.type != "cuda":
            return _Copy(_each(host, lambda part: part.to(self.device, copy=True)), identity, None, None)
        current = torch.cuda.current_stream(self.device)
        self._side = self._side or torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        weight = _each(host, lambda part: torch.empty_like(part, device=self.device))
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            for target, source in zip(weight, host, strict=True):
                if isinstance(target, Tensor) and isinstance(source, Tensor):
                    target.copy_(plain(source), non_blocking=True)
            arrived = self._side.record_event()
        return _Copy(weight, identity, current, arrived)


def _each(weight: Weight, change: Callable[[Tensor], Tensor]) -> Weight:
    parts: Any = (change(plain(part)) if isinstance(part, Tensor) else part for part in weight)
    return Weight(*parts)


def _identity(stack: Stack) -> tuple[Any, ...]:
    """What changes when somebody writes to the weight, or puts another in its place."""
    tensors = [plain(part) for part in (stack.qweight, stack.scales)]
    versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
    return stack.writes, *versions, *(tensor.data_ptr() for tensor in tensors)
