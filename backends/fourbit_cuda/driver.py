"""The CUDA driver through cuda-python: modules and kernels of a device, launched on torch's current stream.

All but the launch goes through cuda.bindings. The launch itself is cuLaunchKernelEx called by ctypes on one
buffer that holds the launch configuration and the parameters; what is not the same at every launch of a kernel for one
shape is packed into it by one struct call.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fourbit_cuda import compiler, libraries
from fourbit_cuda.targets import Target
from fourbit_cuda.tensor_map import INVALID_CONTEXT, MAP_BYTES, encode_function
from fourbit_gpu.device import DeviceProps
from fourbit_gpu.launcher import Grid, Kernel, Launcher, LaunchError
from fourbit_gpu.spec import KernelSpec

_SIZES = struct.Struct("7I4x")
"""The first part of CUlaunchConfig: grid x y z, block x y z, shared bytes."""

_STREAM = "QQI4x"
"""The rest of it: stream, attributes, their number."""

_PDL_ATTRIBUTE = struct.pack("<I4xI60x", 6, 1)
"""CUlaunchAttribute: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 1."""

_DEFAULT_SHARED = 48 << 10
"""Dynamic shared memory that a kernel may have without opting in."""

_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)


def check(result: Any, what: str) -> Any:
    """The values of a cuda.bindings call without its error code. Raises LaunchError, naming `what`."""
    error, *values = result
    if int(error):
        raise LaunchError(f"{what}: {describe_error(int(error))}")
    return values[0] if len(values) == 1 else tuple(values)


def describe_error(code: int) -> str:
    """A driver error's name and text."""
    from cuda.bindings import driver

    error = driver.CUresult(code) if code in driver.CUresult.__members__.values() else None
    if error is None:
        return f"driver error {code}"
    _, name = driver.cuGetErrorName(error)
    _, text = driver.cuGetErrorString(error)
    parts = [part.decode() if isinstance(part, bytes) else str(part) for part in (name, text)]
    return f"{parts[0]} ({code}): {parts[1]}"


def driver_version() -> tuple[int, int]:
    """The newest CUDA version that the driver supports. Raises if there is no driver."""
    from cuda.bindings import driver

    number = int(check(driver.cuDriverGetVersion(), "cuDriverGetVersion"))
    return number // 1000, number % 1000 // 10


class Launch:
    """A kernel with what is the same at each of its launches; called with the other parameters, it launches.

    A launch takes a buffer out of the list and puts it back, so that threads never share one: the driver copies the
    parameters before the call returns.
    """

    def __init__(
        self,
        kernel: CudaKernel,
        grid: Grid,
        threads: int,
        shared_bytes: int,
        count: int,
        last: tuple[int, ...],
        overlapping: bool,
        maps: int,
    ) -> None:
        self._kernel = kernel
        self._index = kernel.launcher.props.index
        self._sizes = (*grid, threads, 1, 1, shared_bytes)
        self._attributes = (kernel.launcher.pdl_address, 1) if overlapping else (0, 0)
        self._format = struct.Struct(f"{_STREAM}{f'{MAP_BYTES}s' * maps}{count}Q")
        self._pack = self._format.pack_into
        self._last = last
        start = _SIZES.size + struct.calcsize(_STREAM)
        self._offsets = [start + MAP_BYTES * i for i in range(maps)]
        self._offsets += [start + MAP_BYTES * maps + 8 * i for i in range(count + len(last))]
        self._free: list[tuple[Any, int, int, Any]] = []

    def _new(self) -> tuple[Any, int, int, Any]:
        """`(memory, its address, address of the parameter pointers, what keeps these alive)`."""
        end = _SIZES.size + self._format.size
        memory = ctypes.create_string_buffer(end + 8 * len(self._last))
        _SIZES.pack_into(memory, 0, *self._sizes)
        struct.pack_into(f"{len(self._last)}Q", memory, end, *self._last)
        address = ctypes.addressof(memory)
        pointers = (ctypes.c_void_p * max(len(self._offsets), 1))(*(address + offset for offset in self._offsets))
        return memory, address, ctypes.addressof(pointers), pointers

    def __call__(self, *parameters: int | bytes) -> None:
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = self._new()
        memory, address, pointers, _ = buffer
        self._pack(memory, _SIZES.size, _raw_stream(self._index), *self._attributes, *parameters)
        kernel = self._kernel
        error = kernel.launch_function(address, kernel.handle, pointers, None)
        if error == INVALID_CONTEXT:  # a thread in which torch has not used this device yet
            kernel.launcher.make_current()
            error = kernel.launch_function(address, kernel.handle, pointers, None)
        self._free.append(buffer)
        if error:
            x, y, z, threads, *_, shared_bytes = self._sizes
            raise LaunchError(
                f"kernel {kernel.spec.label()} on {kernel.launcher.props.name} (cuda:{self._index}), grid"
                f" {(x, y, z)}, {threads} threads, {shared_bytes} bytes of shared memory: {describe_error(error)}"
            )


_MOST_BOUND = 1024
"""Launches that a kernel keeps of those that nobody else does."""


class CudaKernel(Kernel):
    """A kernel in one device's context."""

    def __init__(self, spec: KernelSpec, function: Any, launcher: CudaLauncher, shared_bytes: int) -> None:
        from cuda.bindings import driver

        self.spec = spec
        self.launcher = launcher
        self.launch_function = launcher.launch_function
        self.encode_map = launcher.encode_map
        self.handle = int(function)
        self._function = function
        self._bound: dict[tuple[Grid, int, int, int], Launch] = {}
        attribute = driver.CUfunction_attribute
        # asking for an attribute also makes a lazily loading driver load the kernel now rather than at the launch
        size = driver.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function)
        static_shared_bytes = int(check(size, f"kernel {spec.label()}"))
        if shared_bytes + static_shared_bytes > _DEFAULT_SHARED:
            what = f"kernel {spec.label()}: {shared_bytes} bytes of dynamic shared memory"
            most = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(driver.cuFuncSetAttribute(function, most, shared_bytes), what)

    def blocks_per_sm(self, threads: int, shared_bytes: int = 0) -> int:
        from cuda.bindings import driver

        result = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._function, threads, shared_bytes)
        return int(check(result, f"occupancy of kernel {self.spec.label()}"))

    def bind(
        self,
        grid: Grid,
        threads: int,
        shared_bytes: int,
        count: int,
        last: tuple[int, ...] = (),
        overlapping: bool = False,
        maps: int = 0,
    ) -> Launch:
        """What launches with `maps` tensor maps and `count` parameters, which it is called with, and the `last` ones.

        As `launch` otherwise. `overlapping` sets programmatic stream serialization (sm_90 and newer): the kernel may
        start before the one before it ends, and must wait for it itself (griddepcontrol.wait).
        """
        return Launch(self, grid, threads, shared_bytes, count, last, overlapping, maps)

    def launch(self, grid: Grid, threads: int, shared_bytes: int, args: Sequence[int]) -> None:
        key = (grid, threads, shared_bytes, len(args))
        bound = self._bound.get(key)
        if bound is None:
            if len(self._bound) >= _MOST_BOUND:
                self._bound.clear()
            bound = self._bound[key] = self.bind(*key)
        bound(*args)


class CudaLauncher(Launcher):
    """The kernels of one CUDA device, in torch's (the primary) context."""

    def __init__(self, index: int) -> None:
        from cuda.bindings import driver

        check(driver.cuInit(0), "cuInit")
        torch.cuda.init()  # type: ignore[no-untyped-call]
        device = check(driver.cuDeviceGet(index), f"device {index}")
        # torch holds the primary context for as long as the process lives; so does this
        self._context = check(driver.cuDevicePrimaryCtxRetain(device), f"context of device {index}")
        super().__init__(_props(index, device))
        # int arithmetic on void pointers: the buffers' addresses are passed as they are
        prototype = ctypes.CFUNCTYPE(ctypes.c_int, *(ctypes.c_void_p,) * 4)
        self.launch_function = prototype(_address("cuLaunchKernelEx"))
        self.encode_map = encode_function(_address("cuTensorMapEncodeTiled"), self.make_current)
        self._attributes = ctypes.create_string_buffer(_PDL_ATTRIBUTE, len(_PDL_ATTRIBUTE))
        self.pdl_address = ctypes.addressof(self._attributes)

    def make_current(self) -> None:
        """Make the device's primary context current in this thread, as torch does at its first call."""
        from cuda.bindings import driver

        check(driver.cuCtxSetCurrent(self._context), f"context of device {self.props.index}")

    def _load(self, spec: KernelSpec, shared_bytes: int) -> CudaKernel:
        from cuda.bindings import driver

        code, where = compiler.compiled(spec, self.props.arch)
        with torch.cuda.device(self.props.index):
            self.make_current()
            what = f"kernel {spec.label()} ({where.option}) on {self.props.name}"
            try:
                module = check(driver.cuModuleLoadData(code), what)
            except LaunchError as error:
                raise LaunchError(f"{error}{_advice(where)}") from None
            function = check(driver.cuModuleGetFunction(module, spec.name.encode()), what)
            return CudaKernel(spec, function, self, shared_bytes)


def _advice(where: Target) -> str:
    """What to do where the driver does not take what NVRTC made."""
    supported = driver_version()
    newest = libraries.version()
    if newest <= supported:
        return ""
    made = "PTX" if where.is_ptx else "code"
    return (
        f". NVRTC {libraries.version_text()} made {made} that the driver, for CUDA {supported[0]}.{supported[1]}, may"
        f' be too old for: update the driver, or pip install "nvidia-cuda-nvrtc<={supported[0]}.{supported[1]}.99"'
    )


def _address(name: str) -> int:
    """Address of a driver function."""
    from cuda.bindings import driver

    flags = driver.CUdriverProcAddress_flags.CU_GET_PROC_ADDRESS_DEFAULT
    pointer, _ = check(driver.cuGetProcAddress(name.encode(), 12000, flags), name)
    if not pointer:
        raise LaunchError(f"the driver has no {name}: it is older than CUDA 12")
    return int(pointer)


def _props(index: int, device: Any) -> DeviceProps:
    from cuda.bindings import driver

    kinds = driver.CUdevice_attribute

    def ask(name: str) -> int:
        which = getattr(kinds, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(check(driver.cuDeviceGetAttribute(which, device), name))

    torch_props = torch.cuda.get_device_properties(index)
    bandwidth = 2e3 * ask("MEMORY_CLOCK_RATE") * ask("GLOBAL_MEMORY_BUS_WIDTH") / 8e9  # kHz, bits; double data rate
    return DeviceProps(
        index=index,
        name=torch_props.name,
        arch=ask("COMPUTE_CAPABILITY_MAJOR") * 10 + ask("COMPUTE_CAPABILITY_MINOR"),
        sm_count=ask("MULTIPROCESSOR_COUNT"),
        l2_bytes=ask("L2_CACHE_SIZE"),
        shared_per_block=ask("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        bandwidth=bandwidth,
    )


_launchers: dict[int, CudaLauncher] = {}
_launchers_lock = threading.Lock()


def launcher(index: int) -> CudaLauncher:
    """The launcher of device `index`; one for the life of the process."""
    found = _launchers.get(index)
    if found is None:
        with _launchers_lock:
            found = _launchers.get(index)
            if found is None:
                found = _launchers[index] = CudaLauncher(index)
    return found
