"""Builds and serves the stand-in libamdhip64, and runs in the emulator what is launched through it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
import traceback
from pathlib import Path

import torch

from tests.rocm.gcn.launch import Kernel, load
from tests.rocm.gcn.memory import Memory

SOURCE = Path(__file__).with_name("standin.c")
LAUNCH_FAILED = 719
HANDLER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)
)


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("arguments", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
    ]


def build(folder: Path, hiprtc: Path) -> Path:
    """Make `folder` a ROCM_PATH: lib/libamdhip64.so the stand-in, lib/libhiprtc.so a copy of the real one.

    A copy, because Debian's hipRTC is a part of its libamdhip64, which would count as a second HIP runtime.
    """
    lib = folder / "lib"
    lib.mkdir(parents=True, exist_ok=True)
    library = lib / "libamdhip64.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", str(SOURCE), "-o", str(library)], check=True
    )
    shutil.copyfile(hiprtc, lib / "libhiprtc.so")
    return folder


class Emulator:
    """The stand-in's other half: the made-up device.

    Attributes:
        lock: held by whoever sets what launches may touch and launches.
        visible: the CPU tensors that launches may touch.
        failure: what the last failed launch raised, with its traceback; a driver would only give an error number.
        seed: of registers and LDS at the start of a launch.
        schedule: a seed of the order of waves, or None for the orderly one.
        launches: name, grid and threads of each launch.
    """

    def __init__(self, library: Path, hip_version: int = 50221153) -> None:
        self.lock = threading.RLock()
        self.visible: list[torch.Tensor] = []
        self.failure: BaseException | None = None
        self.seed = 1
        self.schedule: int | None = None
        self.launches: list[tuple[str, tuple[int, ...], int]] = []
        self.executed = 0
        self._modules: list[dict[str, Kernel]] = []
        self._functions: list[Kernel] = []
        self._handler = HANDLER(self._handle)
        self._library = ctypes.CDLL(str(library))
        self._library.standin_register(self._handler, hip_version)

    def _reachable(self) -> Memory:
        """The memory of the visible tensors and nothing else; tensors that overlap count as one buffer."""
        spans = []
        for tensor in self.visible:
            if tensor.numel():
                first = tensor.data_ptr()
                spans.append((first, first + tensor.numel() * tensor.element_size()))
        memory, merged = Memory(), []
        for first, end in sorted(spans):
            if merged and first < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((first, end))
        for number, (first, end) in enumerate(merged):
            memory.register(first, end - first, name=f"tensor {number} of {end - first} bytes")
        return memory

    def _handle(self, what: int, data: int, size: int, handle: int, result: ctypes.Array) -> int:
        try:
            (self._load, self._function, self._launch, self._unload)[what](data, size, handle, result)
            return 0
        except BaseException as error:  # no exception may cross into C
            self.failure = error
            if os.environ.get("FOURBIT_EMULATOR_TRACE"):
                traceback.print_exc()
            return LAUNCH_FAILED

    def _load(self, data: int, size: int, handle: int, result: ctypes.Array) -> None:
        self._modules.append(load(ctypes.string_at(data, size)))
        result[0] = len(self._modules)

    def _function(self, data: int, size: int, handle: int, result: ctypes.Array) -> None:
        self._functions.append(self._modules[handle - 1][ctypes.string_at(data, size).decode()])
        result[0] = len(self._functions)

    def _launch(self, data: int, size: int, handle: int, result: ctypes.Array) -> None:
        launch, kernel = _Launch.from_address(data), self._functions[handle - 1]
        grid, threads = tuple(launch.grid), tuple(launch.threads)
        arguments = ctypes.string_at(launch.arguments, launch.size)
        before = kernel.program.executed
        self.launches.append((kernel.info.name, grid, threads[0]))
        kernel.launch(self._reachable(), grid, threads, arguments, launch.shared, self.seed, self.schedule)
        self.executed += kernel.program.executed - before

    def _unload(self, data: int, size: int, handle: int, result: ctypes.Array) -> None:
        self._modules[handle - 1] = {}
