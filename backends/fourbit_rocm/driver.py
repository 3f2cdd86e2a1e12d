"""The HIP runtime through hip-python: modules and kernels of a device, launched on torch's current stream."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fourbit_gpu.device import DeviceProps
from fourbit_gpu.launcher import Grid, Kernel, Launcher, LaunchError
from fourbit_gpu.spec import KernelSpec
from fourbit_rocm import compiler, libraries
from fourbit_rocm.targets import Target, arch_of, target

# Under ROCm too torch's names say "cuda": the result is a hipStream_t.
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)


def check(result: Any, what: str) -> Any:
    """The values of a hip-python call without its error code. Raises LaunchError, naming `what`."""
    error, *values = result
    if int(error):
        raise LaunchError(f"{what}: {describe_error(error)}")
    return values[0] if len(values) == 1 else tuple(values)


def describe_error(error: Any) -> str:
    """A HIP error's name, number and text; hip-python 7 and 10 give the text in different ways."""
    hip, _ = libraries.bindings()
    text: Any = hip.hipGetErrorString(error)
    if isinstance(text, tuple):
        text = text[-1]
    text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    return f"{getattr(error, 'name', 'hipError_t')} ({int(error)}): {text}"


_parameter_types: dict[int, type[ctypes.Structure]] = {}


def pack(args: Sequence[int]) -> ctypes.Structure:
    """Kernel parameters of eight bytes each as one structure, which hip-python copies in one piece."""
    count = len(args)
    kind = _parameter_types.get(count)
    if kind is None:
        fields = [("values", ctypes.c_uint64 * count)]
        kind = _parameter_types.setdefault(count, type(f"Parameters{count}", (ctypes.Structure,), {"_fields_": fields}))
    return kind.from_buffer_copy(struct.pack(f"{count}Q", *args))


class RocmKernel(Kernel):
    """A kernel loaded on one device. `module` and `code` live as long as it does: see `RocmLauncher._load`."""

    def __init__(self, spec: KernelSpec, function: Any, module: Any, launcher: RocmLauncher, code: bytes) -> None:
        self.spec = spec
        self._module, self._code = module, code
        self._function = function
        self._launcher = launcher
        self._index = launcher.props.index
        self._hip = libraries.bindings()[0]
        self._info = info = compiler.check_code(spec, launcher.target, code)
        self.static_shared_bytes = info.lds_size
        self.parameters = len(info.explicit_arguments)

    def blocks_per_sm(self, threads: int, shared_bytes: int = 0) -> int:
        return self._launcher.target.workgroups(self._info, threads, shared_bytes)

    def launch(
        self, grid: Grid, threads: int, shared_bytes: int, args: Sequence[int], overlapping: bool = False
    ) -> None:
        """As `Kernel.launch`; `overlapping` has no counterpart in HIP, and none is needed for the result."""
        if len(args) != self.parameters:
            raise LaunchError(f"kernel {self.spec.label()} takes {self.parameters} parameters, got {len(args)}")
        (error,) = self._hip.hipModuleLaunchKernel(
            *(self._function, *grid, threads, 1, 1, shared_bytes, self._launcher.stream(), None),
            extra=(pack(args),),
        )
        if int(error):
            raise LaunchError(
                f"kernel {self.spec.label()} on {self._launcher.props.name} ({self._launcher.target.arch}, device"
                f" {self._index}), grid {grid}, {threads} threads, {shared_bytes} bytes of LDS: {describe_error(error)}"
            )


class RocmLauncher(Launcher):
    """The kernels of one device.

    Attributes:
        target: the architecture, and with it the wave size that every kernel is compiled for.
    """

    def __init__(self, index: int, arch: str | None = None, props: DeviceProps | None = None) -> None:
        if arch is None:
            arch = arch_of(torch.cuda.get_device_properties(index).gcnArchName)
        self.target: Target = target(arch)
        super().__init__(props or _reported_props(index, self.target))
        if self.props.warp_size != self.target.wave:
            raise LaunchError(
                f"{self.props.name} ({arch}) reports waves of {self.props.warp_size} lanes, and kernels for {arch} are"
                f" compiled for {self.target.wave}"
            )

    def make_current(self) -> None:
        """Make the device current in this thread for the HIP runtime."""
        hip, _ = libraries.bindings()
        check(hip.hipSetDevice(self.props.index), f"device {self.props.index}")

    def stream(self) -> int:
        """The hipStream_t that kernels are launched on: torch's current one."""
        return _raw_stream(self.props.index)

    def _load(self, spec: KernelSpec, shared_bytes: int) -> RocmKernel:
        hip, _ = libraries.bindings()
        code = compiler.compiled(spec, self.target)
        self.make_current()
        what = f"kernel {spec.label()} ({self.target.arch}) on {self.props.name}"
        module = check(hip.hipModuleLoadData(code), what)
        function = check(hip.hipModuleGetFunction(module, spec.name.encode()), what)
        # the function is valid as long as the module is, and HIP may go on reading the module's image: both are kept
        kernel = RocmKernel(spec, function, module, self, code)
        if shared_bytes + kernel.static_shared_bytes > self.props.shared_per_block:
            raise LaunchError(
                f"{what} wants {shared_bytes} bytes of dynamic LDS beside {kernel.static_shared_bytes}, a workgroup"
                f" can have {self.props.shared_per_block}"
            )
        return kernel


def device_props(where: Target, *, index: int, name: str, units: int, l2_bytes: int, wave: int) -> DeviceProps:
    """DeviceProps of a device with `units` of `targets.Unit`, whose sizes torch and HIP do not all report right."""
    return DeviceProps(
        index=index,
        name=name,
        arch=where.number,
        sm_count=units,
        l2_bytes=l2_bytes,
        shared_per_block=where.unit.lds_of_workgroup,
        warp_size=wave,
    )


def _reported_props(index: int, where: Target) -> DeviceProps:
    found = torch.cuda.get_device_properties(index)
    return device_props(
        where,
        index=index,
        name=found.name,
        units=found.multi_processor_count,
        l2_bytes=found.L2_cache_size,
        wave=found.warp_size,
    )


_launchers: dict[int, RocmLauncher] = {}
_launchers_lock = threading.Lock()


def launcher(index: int) -> RocmLauncher:
    """The launcher of device `index`; one for the life of the process."""
    with _launchers_lock:
        found = _launchers.get(index)
        if found is None:
            found = _launchers[index] = RocmLauncher(index)
        return found
