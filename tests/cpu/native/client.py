"""The Python end of server.cpp: a process that runs kernels, and how calls reach it."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

Argument = int | None | Tensor | tuple[torch.dtype, int]
"""An integer, a null pointer, an input, or the dtype and number of elements of an output."""


class ServerError(AssertionError):
    """The kernel did what it must not: a stray access, or results that depend on threads or addresses."""


class Server:
    """A `server ISA` process; started at the first call, and again after one that ended it."""

    def __init__(self, command: Sequence[str], isa: str) -> None:
        self.command = [*command, isa]
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = tempfile.TemporaryFile()
        self._lock = threading.Lock()

    def call(self, op: str, *arguments: Argument | bool) -> tuple[int, list[Tensor]]:
        """Run `op`, and return its value and its outputs, each 1-D. Raises ServerError."""
        integers = [int(a) for a in arguments if isinstance(a, int)]
        buffers = [a for a in arguments if not isinstance(a, int)]
        inputs, kinds, outputs = [], [], []
        for buffer in buffers:
            if buffer is None:
                kinds.append("0 0")
            elif isinstance(buffer, Tensor):
                inputs.append(_bytes(buffer))
                kinds.append(f"i{inputs[-1].nbytes}")
            else:
                outputs.append(torch.empty(buffer[1], dtype=buffer[0]))
                kinds.append(f"o{outputs[-1].nbytes}")
        header = (
            f"{op} INTEGERS {len(integers)} {' '.join(map(str, integers))} BUFFERS {len(kinds)} {' '.join(kinds)}\n"
        )
        with self._lock:
            return self._exchange(header, inputs, outputs), outputs

    def _exchange(self, header: str, inputs: list[np.ndarray], outputs: list[Tensor]) -> int:
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            for part in (header.encode(), *inputs):
                process.stdin.write(part)
            process.stdin.flush()
        except BrokenPipeError:
            self._died(header)
        kind, *rest = process.stdout.readline().decode().split(maxsplit=1)[:2] or [""]
        if kind == "error":
            raise ServerError(f"{' '.join(self.command)}: {header.strip()}: {rest[0].strip()}")
        if kind != "ok":
            self._died(header)
        value, size = map(int, rest[0].split())
        assert size == sum(output.nbytes for output in outputs), f"{header.strip()} answered {size} bytes"
        for output in outputs:
            if output.nbytes and process.stdout.readinto(memoryview(_bytes(output))) != output.nbytes:
                self._died(header)
        return value

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._errors.seek(0)
            self._errors.truncate()
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
            )
        return self._process

    def _died(self, header: str) -> NoReturn:
        process, self._process = self._process, None
        assert process is not None and process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):  # of what is left in its buffer
            process.stdin.close()
        process.stdout.close()
        try:
            status = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        self._errors.seek(0)
        report = self._errors.read().decode(errors="replace")
        raise ServerError(f"{' '.join(self.command)} ended with status {status} in {header.strip()}\n{report}")

    def close(self) -> int:
        """End the process; its exit status, which is that of a sanitizer where one has a last word."""
        process, self._process = self._process, None
        if process is not None:
            process.communicate()
        self._errors.close()
        return process.returncode if process is not None else 0

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _bytes(tensor: Tensor) -> np.ndarray:
    """The tensor's memory. A backend's tensors are contiguous, which is checked here for every one."""
    assert tensor.is_contiguous(), f"a backend got a tensor with strides {tensor.stride()}"
    if tensor.numel() == 0:
        return np.empty(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * tensor.nbytes).from_address(tensor.data_ptr()))
