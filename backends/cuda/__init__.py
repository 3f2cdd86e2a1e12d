"""The CUDA backend: kernels compiled at run time by NVRTC, launched through the driver on torch's current stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from fourbit.backend import COMPOSITIONS, SUPPORTED, Backend, OpQuery, Support
from fourbit.backends.gpu.backend import GpuBackend
from fourbit.hookspecs import hookimpl

if TYPE_CHECKING:
    from fourbit.backends.gpu.launcher import Launcher

OLDEST_ARCH = 75
"""Compute capability times ten of the oldest GPUs served (Turing)."""


class CudaBackend(GpuBackend):
    """NVIDIA GPUs from compute capability 7.5 on."""

    api_version = 1
    name = "cuda"
    device_types = ("cuda",)

    def unavailable(self) -> str | None:
        from fourbit.backends.cuda.requirements import missing

        return missing()

    def supports(self, query: OpQuery) -> Support:
        major, minor = torch.cuda.get_device_capability(query.device)
        if major * 10 + minor < OLDEST_ARCH:
            name = torch.cuda.get_device_name(query.device)
            return Support.no(f"{name} has compute capability {major}.{minor}, and 7.5 is the least")
        return SUPPORTED

    def describe(self, query: OpQuery, shape: Sequence[int]) -> str:
        from fourbit.backends.cuda import compiler

        if query.op in COMPOSITIONS and getattr(CudaBackend, query.op) is getattr(Backend, query.op):
            return f"composed: {COMPOSITIONS[query.op]}"
        props = self._launcher(query.device).props
        where = compiler.target(props.arch)
        how = f", {where.option} finished by the driver" if where.is_ptx else f", {where.option}"
        return f"one kernel of its own (NVRTC {compiler.version_text()}{how})"

    def _new_launcher(self, index: int) -> Launcher:
        from fourbit.backends.cuda.driver import launcher

        return launcher(index)


@hookimpl
def fourbit_register_backends(register: Callable[[Backend], None]) -> None:
    """Register the CUDA backend; under ROCm, whose device type is "cuda" too, the rocm backend serves."""
    if torch.version.hip is None:
        register(CudaBackend())
