"""The rocm backend on CPU tensors: the same ops, compiler and driver, launched into the emulator."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fourbit_gpu.device import DeviceProps
from fourbit_gpu.spec import KernelSpec
from fourbit_rocm import RocmBackend, libraries
from fourbit_rocm.driver import RocmKernel, RocmLauncher, device_props
from fourbit_rocm.targets import target
from tests.rocm.gcn import standin, tiers
from tests.rocm.gcn.errors import KernelTrap


class _Created(TorchDispatchMode):
    """Keeps every tensor that operations return, so that a launch may write to it."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        created = [result] if isinstance(result, torch.Tensor) else result
        if isinstance(created, (list, tuple)):
            self.tensors += [each for each in created if isinstance(each, torch.Tensor)]
        return result


def _tensors(values: Any) -> list[torch.Tensor]:
    """The tensors in arguments, dataclasses and sequences included."""
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, (list, tuple)):
        return [tensor for value in values for tensor in _tensors(value)]
    if hasattr(values, "__dataclass_fields__"):
        return [tensor for name in values.__dataclass_fields__ for tensor in _tensors(getattr(values, name))]
    return []


class EmulatedLauncher(RocmLauncher):
    """A launcher where torch has no GPU to ask, and where a tier may stand in for hipRTC in this process."""

    def __init__(self, arch: str, props: DeviceProps) -> None:
        super().__init__(0, arch, props)
        self.tier = tiers.tier_for(arch)

    def _load(self, spec: KernelSpec, shared_bytes: int) -> RocmKernel:
        with tiers.serving(self.tier):
            return super()._load(spec, shared_bytes)

    def stream(self) -> int:
        return 0  # torch may be built for CUDA, whose streams cannot be had without a GPU

    def _is_capturing(self) -> bool:
        return False


class EmulatedBackend(RocmBackend):
    """RocmBackend for an architecture that is not here. Only where tensors live and what a device is differ."""

    device_types = ("cpu",)

    def __init__(self, emulator: standin.Emulator, arch: str, name: str = "rocm", units: int = 1) -> None:
        super().__init__()
        self.name = name
        self.emulator = emulator
        self.arch = arch
        where = target(arch)
        # few units, so that small inputs are more than the device holds at once
        self.props = device_props(
            where, index=0, name=f"emulated {arch}", units=units, l2_bytes=4 << 20, wave=where.wave
        )

    def unavailable(self) -> str | None:
        return None

    def _arch(self, device: torch.device) -> str:
        return self.arch

    def _launcher(self, device: torch.device) -> RocmLauncher:
        if 0 not in self._launchers:
            self._launchers[0] = EmulatedLauncher(self.arch, self.props)
        return self._launchers[0]

    def embedding_4bit(self, *args: Any, **options: Any) -> torch.Tensor:
        try:
            return super().embedding_4bit(*args, **options)
        except KernelTrap as error:  # on a device it ends the process; tensors on the CPU expect an IndexError
            raise IndexError(f"embedding_4bit: an id is out of range: {error}") from error

    def _run(self, function: Callable[..., Any], device: torch.device, *args: Any) -> Any:
        with self.emulator.lock:  # one launch at a time
            return self._run_alone(function, device, *args)

    def _run_alone(self, function: Callable[..., Any], device: torch.device, *args: Any) -> Any:
        tensors = _tensors(args)
        self.emulator.failure = None
        self.emulator.visible = tensors
        try:
            with _Created(tensors):
                return function(self._launcher(device), *args)
        except Exception as error:
            if self.emulator.failure is not None:
                raise self.emulator.failure from error
            raise
        finally:
            self.emulator.visible = []


@functools.lru_cache(maxsize=1)
def emulator(hiprtc: Path) -> standin.Emulator:
    """The process's emulator, with hip-python over the stand-in and the real hipRTC at `hiprtc`."""
    if libraries.loaded("libamdhip64.so"):
        raise RuntimeError("a HIP runtime is loaded already: the stand-in must be the first")
    folder = standin.build(Path(tempfile.mkdtemp(prefix="fourbit-rocm-")), hiprtc)
    os.environ["ROCM_PATH"] = str(folder)
    return standin.Emulator(folder / "lib" / "libamdhip64.so")
