"""The CUDA backend: kernels compiled at run time by NVRTC, launched through the driver on torch's current stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fourbit.backend import COMPOSITIONS, SUPPORTED, Backend, OpQuery, Support
from fourbit.hookspecs import hookimpl

if TYPE_CHECKING:
    from fourbit.backends.gpu.launcher import Launcher

OLDEST_ARCH = 75
"""Compute capability times ten of the oldest GPUs served (Turing)."""

Optional = Tensor | None
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: 0)


class CudaBackend(Backend):
    """NVIDIA GPUs from compute capability 7.5 on."""

    api_version = 1
    name = "cuda"
    device_types = ("cuda",)

    def __init__(self) -> None:
        self._launchers: dict[int, Launcher] = {}

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

    # ---- devices --------------------------------------------------------------------------------------------

    def _launcher(self, device: torch.device) -> Launcher:
        index = device.index if device.index is not None else _current_device()
        found = self._launchers.get(index)
        if found is None:
            from fourbit.backends.cuda.driver import launcher

            found = self._launchers[index] = launcher(index)
        return found

    def _run(self, function: Callable[..., Any], device: torch.device, *args: Any) -> Any:
        """`function(launcher, *args)` with `device` current."""
        launcher = self._launchers.get(device.index) or self._launcher(device)
        if _current_device() == launcher.props.index:
            return function(launcher, *args)
        with torch.cuda.device(launcher.props.index):
            return function(launcher, *args)

    # ---- ops ------------------------------------------------------------------------------------------------

    def quantize_4bit(self, w: Tensor, code: Tensor, blocksize: int, signed_scale: bool) -> tuple[Tensor, Tensor]:
        from fourbit.backends.gpu import elementwise

        result: tuple[Tensor, Tensor] = self._run(elementwise.quantize, w.device, w, code, blocksize, signed_scale)
        return result

    def dequantize_4bit(
        self,
        packed: Tensor,
        absmax: Tensor,
        code: Tensor,
        blocksize: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        nested_absmax: Optional = None,
        nested_code: Optional = None,
        nested_offset: Optional = None,
    ) -> Tensor:
        from fourbit.backends.gpu import elementwise

        nested = (nested_absmax, nested_code, nested_offset)
        weight = (packed, absmax, code, blocksize)
        result: Tensor = self._run(elementwise.dequantize, packed.device, *weight, shape, dtype, *nested)
        return result

    def embedding_4bit(
        self,
        ids: Tensor,
        packed: Tensor,
        absmax: Tensor,
        code: Tensor,
        blocksize: int,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype,
        nested_absmax: Optional = None,
        nested_code: Optional = None,
        nested_offset: Optional = None,
    ) -> Tensor:
        from fourbit.backends.gpu import elementwise

        nested = (nested_absmax, nested_code, nested_offset)
        weight = (packed, absmax, code, blocksize, num_embeddings, embedding_dim)
        result: Tensor = self._run(elementwise.embedding, ids.device, ids, *weight, dtype, *nested)
        return result

    def quantize_blockwise(self, x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
        from fourbit.backends.gpu import elementwise

        result: tuple[Tensor, Tensor] = self._run(elementwise.quantize_blockwise, x.device, x, code, blocksize)
        return result

    def dequantize_blockwise(
        self, codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
    ) -> Tensor:
        from fourbit.backends.gpu import elementwise

        args = (codes, absmax, code, blocksize, dtype)
        result: Tensor = self._run(elementwise.dequantize_blockwise, codes.device, *args)
        return result


@hookimpl
def fourbit_register_backends(register: Callable[[Backend], None]) -> None:
    """Register the CUDA backend; under ROCm, whose device type is "cuda" too, the rocm backend serves."""
    if torch.version.hip is None:
        register(CudaBackend())
