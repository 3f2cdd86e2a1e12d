"""GpuBackend: the ops of the cuda and rocm backends, which differ in how kernels are compiled and launched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fourbit.backend import Backend
from fourbit.weight import Weight

if TYPE_CHECKING:
    from fourbit_gpu.launcher import Launcher

current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: 0)


class GpuBackend(Backend):
    """A backend whose kernels are in `backends/fourbit_gpu/kernels`. Subclasses make the Launcher of a device."""

    priority = 5  # one that a user installed beside it is meant to be used

    def __init__(self) -> None:
        self._launchers: dict[int, Launcher] = {}

    def _new_launcher(self, index: int) -> Launcher:
        """The Launcher of device `index`; called once for each."""
        raise NotImplementedError

    # ---- devices --------------------------------------------------------------------------------------------

    def _launcher(self, device: torch.device) -> Launcher:
        index = device.index if device.index is not None else current_device()
        found = self._launchers.get(index)
        if found is None:
            found = self._launchers[index] = self._new_launcher(index)
        return found

    def _run(self, function: Callable[..., Any], device: torch.device, *args: Any) -> Any:
        """`function(launcher, *args)` with `device` current."""
        launcher = self._launchers.get(device.index) or self._launcher(device)
        if current_device() == launcher.props.index:
            return function(launcher, *args)
        with torch.cuda.device(launcher.props.index):
            return function(launcher, *args)

    # ---- ops ------------------------------------------------------------------------------------------------

    def quantize_4bit(self, w: Tensor, code: Tensor, blocksize: int, signed_scale: bool) -> tuple[Tensor, Tensor]:
        from fourbit_gpu import elementwise

        result: tuple[Tensor, Tensor] = self._run(elementwise.quantize, w.device, w, code, blocksize, signed_scale)
        return result

    def dequantize_4bit(self, weight: Weight, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        from fourbit_gpu import elementwise

        result: Tensor = self._run(elementwise.dequantize, weight.packed.device, weight, shape, dtype)
        return result

    def embedding_4bit(
        self, ids: Tensor, weight: Weight, num_embeddings: int, embedding_dim: int, dtype: torch.dtype
    ) -> Tensor:
        from fourbit_gpu import elementwise

        args = (ids, weight, num_embeddings, embedding_dim, dtype)
        result: Tensor = self._run(elementwise.embedding, ids.device, *args)
        return result

    def linear_4bit_grad(self, grad: Tensor, weight: Weight, in_features: int) -> Tensor:
        from fourbit_gpu import pieces

        result: Tensor = self._run(pieces.linear_grad, grad.device, grad, weight, in_features)
        return result

    def quantize_blockwise(self, x: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
        from fourbit_gpu import elementwise

        result: tuple[Tensor, Tensor] = self._run(elementwise.quantize_blockwise, x.device, x, code, blocksize)
        return result

    def dequantize_blockwise(
        self, codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
    ) -> Tensor:
        from fourbit_gpu import elementwise

        args = (codes, absmax, code, blocksize, dtype)
        result: Tensor = self._run(elementwise.dequantize_blockwise, codes.device, *args)
        return result
