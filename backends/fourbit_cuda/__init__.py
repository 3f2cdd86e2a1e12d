"""The CUDA backend: kernels compiled at run time by NVRTC, launched through the driver on torch's current stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fourbit.backend import SUPPORTED, Backend, OpQuery, Support
from fourbit.hookspecs import hookimpl
from fourbit.weight import Weight
from fourbit_gpu.backend import GpuBackend, current_device

if TYPE_CHECKING:
    from fourbit_gpu.launcher import Launcher


class CudaBackend(GpuBackend):
    """NVIDIA GPUs from compute capability 7.5 on."""

    api_version = 2
    name = "cuda"
    device_types = ("cuda",)

    def unavailable(self) -> str | None:
        from fourbit_cuda.requirements import missing

        return missing()

    def supports(self, query: OpQuery) -> Support:
        from fourbit_cuda.targets import OLDEST_ARCH

        major, minor = torch.cuda.get_device_capability(query.device)
        if major * 10 + minor < OLDEST_ARCH:
            name = torch.cuda.get_device_name(query.device)
            return Support.no(f"{name} has compute capability {major}.{minor}, and 7.5 is the least")
        return SUPPORTED

    def describe(self, query: OpQuery, shape: Sequence[int]) -> str:
        from fourbit_cuda import libraries, linear, targets

        if self.composes(query.op):
            return super().describe(query, shape)
        props = self._launcher(query.device).props
        where = targets.target(props.arch)
        how = f"NVRTC {libraries.version_text()}, {where.option}{', finished by the driver' if where.is_ptx else ''}"
        if "linear" in query.op:
            plan = linear.describe(props, query.op, query.dtype, query.blocksize, query.nested, tuple(shape))
            return f"{plan} ({how})"
        return f"one kernel of its own ({how})"

    def _new_launcher(self, index: int) -> Launcher:
        from fourbit_cuda import linear
        from fourbit_cuda.driver import launcher

        self._linear, self._linear_grad = linear.linear, linear.linear_grad
        return launcher(index)

    # ---- products -------------------------------------------------------------------------------------------

    def linear_4bit(self, x: Tensor, weight: Weight, out_features: int, bias: Tensor | None = None) -> Tensor:
        # the hot path: as little as possible between the op and the launch
        index = x.device.index
        launcher = self._launchers.get(index)
        if launcher is not None and current_device() == index:
            return self._linear(launcher, x, weight, out_features, bias)
        self._launcher(x.device)
        result: Tensor = self._run(self._linear, x.device, x, weight, out_features, bias)
        return result

    def linear_4bit_grad(self, grad: Tensor, weight: Weight, in_features: int) -> Tensor:
        index = grad.device.index
        launcher = self._launchers.get(index)
        if launcher is not None and current_device() == index:
            return self._linear_grad(launcher, grad, weight, in_features)
        self._launcher(grad.device)
        result: Tensor = self._run(self._linear_grad, grad.device, grad, weight, in_features)
        return result

    def grouped_linear_4bit(self, x: Tensor, offsets: Tensor, weight: Weight, out_features: int) -> Tensor:
        from fourbit_cuda import linear

        result: Tensor | None = self._run(linear.grouped, x.device, x, offsets, weight, out_features)
        return super().grouped_linear_4bit(x, offsets, weight, out_features) if result is None else result

    def grouped_linear_4bit_grad(self, grad: Tensor, offsets: Tensor, weight: Weight, in_features: int) -> Tensor:
        from fourbit_cuda import linear

        result: Tensor | None = self._run(linear.grouped_grad, grad.device, grad, offsets, weight, in_features)
        return super().grouped_linear_4bit_grad(grad, offsets, weight, in_features) if result is None else result


@hookimpl
def fourbit_register_backends(register: Callable[[Backend], None]) -> None:
    """The built-in CUDA backend; unavailable where torch is not built for CUDA (ROCm's device type is "cuda" too)."""
    register(CudaBackend())
