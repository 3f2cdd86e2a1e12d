"""The ROCm backend: kernels compiled at run time by hipRTC, launched through HIP on torch's current stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fourbit.backend import SUPPORTED, Backend, OpQuery, Support
from fourbit.hookspecs import hookimpl
from fourbit.weight import Weight
from fourbit_gpu.backend import GpuBackend

if TYPE_CHECKING:
    from fourbit_rocm.driver import RocmLauncher


class RocmBackend(GpuBackend):
    """AMD GPUs: CDNA 2 to 4 with waves of 64 lanes, RDNA 2 to 4 with waves of 32."""

    api_version = 2
    name = "rocm"
    device_types = ("cuda",)

    def unavailable(self) -> str | None:
        from fourbit_rocm.requirements import missing

        return missing()

    def default_blocksize(self, device: torch.device) -> int:
        return 128

    def supports(self, query: OpQuery) -> Support:
        from fourbit_rocm.targets import UnknownArchError, target

        try:
            target(self._arch(query.device))
        except UnknownArchError as error:
            return Support.no(str(error))
        return SUPPORTED

    def _arch(self, device: torch.device) -> str:
        from fourbit_rocm.targets import arch_of

        return arch_of(torch.cuda.get_device_properties(device).gcnArchName)

    def describe(self, query: OpQuery, shape: Sequence[int]) -> str:
        from fourbit_rocm import libraries, linear

        if self.composes(query.op):
            return super().describe(query, shape)
        arch = self._arch(query.device)
        how = f"hipRTC {libraries.version_text()}, {arch}"
        if query.op in ("linear_4bit", "linear_4bit_grad"):
            return f"{linear.describe(query, shape, arch)} ({how})"
        return f"one kernel of its own ({how})"

    def _new_launcher(self, index: int) -> RocmLauncher:
        from fourbit_rocm.driver import launcher

        return launcher(index)

    def linear_4bit(self, x: Tensor, weight: Weight, out_features: int, bias: Tensor | None = None) -> Tensor:
        from fourbit_rocm import linear

        result: Tensor = self._run(linear.linear, x.device, x, weight, out_features, bias)
        return result


@hookimpl
def fourbit_register_backends(register: Callable[[Backend], None]) -> None:
    """The built-in ROCm backend; unavailable where torch is not built for ROCm."""
    register(RocmBackend())
