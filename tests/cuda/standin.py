"""A stand-in for the CUDA driver's launch, and a launcher of a made-up H100 that launches by it."""

from __future__ import annotations

import ctypes
import struct

from fourbit_cuda.driver import CudaKernel
from fourbit_gpu.device import DeviceProps
from fourbit_gpu.launcher import Launcher

H100 = DeviceProps(0, "made up", 90, 132, 50 << 20, 227 << 10, 32, 3352.0)
PROTOTYPE = ctypes.CFUNCTYPE(ctypes.c_int, *(ctypes.c_void_p,) * 4)


class Driver:
    """Takes launches as cuLaunchKernelEx does, notes each as `(configuration, parameters)`, and answers with `errors`.

    `sizes`: bytes of each parameter to read.
    """

    def __init__(self):
        self.launches, self.errors = [], []
        self.sizes = ()

    def launch(self, config, function, pointers, extra):
        fields = struct.unpack("7I4xQQI4x", ctypes.string_at(config, 56))
        found = []
        for i, size in enumerate(self.sizes):
            (at,) = struct.unpack("Q", ctypes.string_at(pointers + 8 * i, 8))
            data = ctypes.string_at(at, size)
            found.append(struct.unpack("Q", data)[0] if size == 8 else data)
        self.launches.append((fields, tuple(found)))
        return self.errors.pop() if self.errors else 0


class MadeUp(Launcher):
    """Of a device without a driver: CudaKernels, but for what asks the real one."""

    pdl_address = 77

    def __init__(self, launch):
        super().__init__(H100)
        self.launch_function = PROTOTYPE(launch)
        self.made_current = 0

    def make_current(self):
        self.made_current += 1

    def _is_capturing(self):
        return False

    def _load(self, spec, shared_bytes):
        made = object.__new__(CudaKernel)
        made.spec, made.launcher, made.launch_function, made.encode_map = spec, self, self.launch_function, encode
        made.handle, made._bound = 11, {}
        return made


def encode(at, datatype, rank, address, dims, strides, box, steps, *rest):
    """A map that can be read."""
    ctypes.memmove(at, struct.pack("3Q", address, *(ctypes.c_uint64 * 2).from_address(dims)).ljust(128, b"\0"), 128)
    return 0
