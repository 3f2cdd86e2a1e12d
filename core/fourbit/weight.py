"""Weight: the one record of a packed 4-bit weight, which ops, backends and modules pass on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fourbit import checks, scales
from fourbit.scales import NESTED_BLOCKSIZE


class Weight(NamedTuple):
    """A packed 4-bit weight of n elements, as flat tensors; its shape is the op's business.

    `packed`: uint8, ceil(n/2) bytes in any shape; element 2i in the high nibble of byte i.
    `absmax`: the scales, float32 with ceil(n/blocksize) elements in any shape. If `nested_absmax` is given they are
    uint8 codes instead, and scale i is `nested_code[absmax[i]] * nested_absmax[i // 256] + nested_offset`, in
    float32, the product rounded before the sum (no fused multiply-add).
    `code`: float32 [16], the codebook.
    `blocksize`: consecutive elements that share a scale.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    blocksize: int
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_offset: Tensor | None = None

    @property
    def nested(self) -> bool:
        """Whether the scales are codes."""
        return self.nested_absmax is not None

    def scales(self) -> Tensor:
        """The scales as float32, decoded if they are codes."""
        return scales.decode(self.absmax, *self[4:])

    def flat(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The first four fields, and the nested three if there are any: around the sizes in torch's schemas."""
        return self[:4], self[4:] if self[4] is not None else ()

    def checked(self, op: str, count: int, device: torch.device) -> Weight:
        """The weight with contiguous tensors. Raises ValueError if it is none of `count` elements on `device`."""
        packed, absmax, code, blocksize, a, b, c = self
        if packed.numel() != (count + 1) // 2 or packed.dtype is not torch.uint8:
            raise ValueError(
                f"{op}: packed must be uint8 with {(count + 1) // 2} bytes for {count} elements,"
                f" got {packed.dtype} {list(packed.shape)} ({packed.numel()} elements)"
            )
        if packed.device != device:
            checks.wrong_device(op, "packed", packed, device)
        check_scales(op, count, device, absmax, code, blocksize, a, b, c)
        if packed.is_contiguous() and absmax.is_contiguous() and code.is_contiguous():
            if a is None or b is None or (a.is_contiguous() and b.is_contiguous()):  # c is one number
                return self
        return Weight(*(part.contiguous() if isinstance(part, Tensor) else part for part in self))  # type: ignore[arg-type]

    def expert(self, index: int, size: int) -> Weight | None:
        """Element `index` of stacked weights of `size` elements, its scales decoded; None if blocks straddle them."""
        if size % self.blocksize:
            return None
        blocks = size // self.blocksize
        first = index * blocks
        absmax = self.absmax.reshape(-1)[first : first + blocks]
        absmax = scales.decode(absmax, *self[4:], first=first)
        packed = self.packed.reshape(-1)[index * size // 2 : (index + 1) * size // 2]
        return Weight(packed, absmax, self.code, self.blocksize)


def check_scales(
    op: str,
    count: int,
    device: torch.device,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> None:
    """Raise ValueError unless these are the scales and the codebook of a weight of `count` elements on `device`."""
    if blocksize & (blocksize - 1) or not checks.MIN_BLOCKSIZE <= blocksize <= checks.MAX_BLOCKSIZE:
        checks.blocksize(op, blocksize)
    blocks = -(-count // blocksize)
    if absmax.numel() != blocks or absmax.dtype is not (torch.float32 if nested_absmax is None else torch.uint8):
        checks.wrong_absmax(op, absmax, blocks, nested_absmax is not None, count, blocksize)
    if absmax.device != device:
        checks.wrong_device(op, "absmax", absmax, device)
    if code.numel() != 16 or code.dtype is not torch.float32 or code.device != device:
        checks.code(op, code, 16, device)
    if nested_absmax is None:
        if nested_code is not None or nested_offset is not None:
            raise ValueError(f"{op}: nested_code or nested_offset is given without nested_absmax")
        return
    if nested_code is None or nested_offset is None:
        raise ValueError(f"{op}: nested_absmax is given without nested_code and nested_offset")
    for name, tensor, size in (
        ("nested_absmax", nested_absmax, -(-blocks // NESTED_BLOCKSIZE)),
        ("nested_code", nested_code, 256),
        ("nested_offset", nested_offset, 1),
    ):
        if tensor.dtype is not torch.float32 or tensor.numel() != size:
            raise ValueError(
                f"{op}: {name} must be float32 with {size} elements, got {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.device != device:
            checks.wrong_device(op, name, tensor, device)
