"""A fourbit backend for a pretend chip, whose memory is the CPU's: all that a third-party backend needs."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from fourbit.backend import SUPPORTED, Backend, OpQuery, Support
from fourbit.codebooks import thresholds
from fourbit.hookspecs import hookimpl
from fourbit.weight import Weight


class ExampleBackend(Backend):
    """The two required ops; the base class composes the rest of them."""

    api_version = 2
    name = "example"
    device_types = ("cpu",)
    priority = -10  # below the reference's 0: runs only where it is asked for by name

    def supports(self, query: OpQuery) -> Support:
        if query.dtype is torch.float16:
            return Support.no("the pretend chip has no float16")
        if query.blocksize > 1024:
            return Support.no(f"its block buffer holds 1024 elements, not {query.blocksize}")
        return SUPPORTED

    def quantize_4bit(self, w: Tensor, code: Tensor, blocksize: int, signed_scale: bool) -> tuple[Tensor, Tensor]:
        count = w.numel()
        blocks = pad(w.reshape(-1).float(), (0, -count % blocksize)).view(-1, blocksize)
        low, high = blocks.amin(1), blocks.amax(1)
        absmax = torch.maximum(high, -low)
        if signed_scale:
            absmax = torch.where(high >= -low, absmax, low)
        absmax = torch.where(absmax.isfinite(), absmax, torch.nan) + 0.0
        scale = absmax[:, None]
        normalized = torch.where(scale.abs() < 2.0**-126, blocks / scale, blocks * (1 / scale))
        normalized = torch.where(scale.isnan() | (scale == 0), 0.0, normalized)
        edges, codes = thresholds(code)
        nibbles = codes[torch.bucketize(normalized, edges)].view(-1)[: count + count % 2]
        return ((nibbles[0::2] << 4) | nibbles[1::2]).view(-1, 1), absmax

    def dequantize_4bit(self, weight: Weight, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count, packed = torch.Size(shape).numel(), weight.packed.reshape(-1)
        nibbles = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:count]
        scales = weight.scales().reshape(-1).repeat_interleave(weight.blocksize)[:count]
        return (weight.code[nibbles.int()] * scales).to(dtype).view(tuple(shape))


@hookimpl
def fourbit_register_backends(register: Callable[[Backend], None]) -> None:
    register(ExampleBackend())
