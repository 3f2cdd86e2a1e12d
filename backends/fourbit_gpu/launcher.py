"""Launcher: the kernels of one device, compiled and loaded when first wanted. Vendor by vendor only `_load` differs."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from fourbit_gpu.device import DeviceProps
from fourbit_gpu.spec import KernelSpec

Grid = tuple[int, int, int]


class LaunchError(RuntimeError):
    """The driver refused to load or launch a kernel; the message names the kernel and the driver's error."""


class Kernel(ABC):
    """A loaded kernel.

    Attributes:
        spec: what it was made from.
    """

    spec: KernelSpec

    @abstractmethod
    def launch(self, grid: Grid, threads: int, shared_bytes: int, args: Sequence[int]) -> None:
        """Launch on torch's current stream of the kernel's device, which must be current.

        Args:
            grid: blocks in x, y and z.
            threads: per block, in x.
            shared_bytes: dynamic shared memory.
            args: the parameters, each of eight bytes: pointers and non-negative integers.

        Raises LaunchError.
        """

    @abstractmethod
    def blocks_per_sm(self, threads: int, shared_bytes: int = 0) -> int:
        """How many blocks a multiprocessor holds at once."""


class Launcher(ABC):
    """The kernels of one device. `kernel` is slow the first time and a dictionary lookup from then on."""

    def __init__(self, props: DeviceProps) -> None:
        self.props = props
        self._kernels: dict[tuple[KernelSpec, int], Kernel] = {}
        self._lock = threading.Lock()

    def kernel(self, spec: KernelSpec, shared_bytes: int = 0) -> Kernel:
        """The kernel, compiled (or from the cache on disk) and loaded, able to have `shared_bytes` of dynamic
        shared memory. Raises CompileError, LaunchError, and RuntimeError while a graph is being captured."""
        found = self._kernels.get((spec, shared_bytes))
        if found is not None:
            return found
        if self._is_capturing():
            raise RuntimeError(
                f"kernel {spec.label()} is not loaded yet, and none can be loaded while a CUDA graph is captured:"
                " run the same operation once before the capture, or call fourbit_gpu.warmup.warmup(model)"
            )
        with self._lock:
            found = self._kernels.get((spec, shared_bytes))
            if found is None:
                found = self._kernels[spec, shared_bytes] = self._load(spec, shared_bytes)
            return found

    def launch(self, spec: KernelSpec, grid: Grid, threads: int, shared_bytes: int, args: Sequence[int]) -> None:
        """`kernel(spec, shared_bytes).launch(…)`."""
        self.kernel(spec, shared_bytes).launch(grid, threads, shared_bytes, args)

    def _is_capturing(self) -> bool:
        """Whether a graph is being captured on the current stream."""
        return torch.cuda.is_current_stream_capturing()

    @abstractmethod
    def _load(self, spec: KernelSpec, shared_bytes: int) -> Kernel:
        """Compile and load."""

    def loaded(self) -> list[Kernel]:
        """What has been loaded so far."""
        return list(self._kernels.values())
