"""How the scales of a weight are stored, as data: a format has a name, a table and an encoder; all decode alike.

Either float32, or a code of 8 bits each: scale = nested_code[q] * nested_absmax[block of 256] + nested_offset, in
float32, the product rounded before the sum. What is in the table is the format's business, so that a new format
needs no new kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ldexp

import torch
from torch import Tensor

from fourbit.codebooks import dynamic_map
from fourbit.float_environment import subnormals_kept

NESTED_BLOCKSIZE = 256
"""Scales that share a nested scale. Fixed: it is what every published checkpoint has."""

NAN_CODE = 126
"""The code that stands for NaN where a weight has non-finite blocks; its usual value is -5.5e-7."""


def exact_mean(values: Tensor) -> float:
    """The mean of a float32 tensor, rounded once to float32: the same on every device, in any order.

    Mantissas are added up as integers, exponent by exponent, and the total is divided exactly. `values`
    must be finite. Returns 0.0 for an empty tensor.
    """
    count = values.numel()
    bits = values.reshape(-1).contiguous().view(torch.int32)
    exponent = (bits >> 23) & 0xFF
    mantissa = (bits & 0x7FFFFF) | ((exponent > 0).int() << 23)
    signed = torch.where(bits < 0, -mantissa, mantissa).long()
    sums = torch.zeros(256, dtype=torch.int64, device=values.device)
    sums.index_add_(0, exponent, signed)
    # in units of 2^-149, the smallest subnormal
    total = sum(part << max(power - 1, 0) for power, part in enumerate(sums.tolist()))
    return _divide_to_float32(total, max(count, 1))


def _divide_to_float32(total: int, count: int) -> float:
    """total/count · 2^-149 rounded to float32, to nearest with ties to even, from exact integers."""
    magnitude = abs(total)
    shift = max((magnitude // count).bit_length() - 24, 0)
    divisor = count << shift
    quotient, rest = divmod(magnitude, divisor)
    if 2 * rest > divisor or (2 * rest == divisor and quotient % 2):
        quotient += 1
    return ldexp(-quotient if total < 0 else quotient, shift - 149)


Encoded = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""absmax, nested_absmax, nested_code, nested_offset: as `decode`, `QuantState` and `Weight` take them."""


@dataclass(frozen=True)
class ScaleFormat:
    """How the scales of a weight are stored.

    Attributes:
        name: of the format, for people.
        table: on a device, what the 256 codes stand for, float32 [256]; None if the scales are no codes.
        encode: float32 scales [b] to `Encoded`: codes uint8 [b], nested_absmax float32 [ceil(b/256)], the table, and
            the offset, a float32 scalar; or the scales themselves and None for each of the others.
    """

    name: str
    table: Callable[[torch.device], Tensor] | None
    encode: Callable[[Tensor], Encoded]


@subnormals_kept
def double_quantize(
    absmax: Tensor, code: Tensor, quantize_blockwise: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The scales less their mean, quantized in turn (QLoRA, arXiv 2305.14314, section 3). The offset is the mean.

    A scale of NaN (a block with NaN or Inf) must stay NaN and harm no other: it is left out of the mean and, only
    then, takes a code of its own, whose table entry is NaN.
    """
    bad = ~torch.isfinite(absmax)
    any_bad = bool(bad.any())
    offset = torch.tensor(exact_mean(absmax[~bad] if any_bad else absmax), dtype=torch.float32)
    offset = offset.to(absmax.device)
    centred = absmax - offset
    if any_bad:
        centred = torch.where(bad, torch.zeros_like(centred), centred)
    codes, nested_absmax = quantize_blockwise(centred, code, NESTED_BLOCKSIZE)
    if any_bad:
        code = code.clone()
        code[NAN_CODE] = torch.nan
        codes = torch.where(codes == NAN_CODE, NAN_CODE + 1, codes)  # the entry above it is 0
        codes = torch.where(bad, NAN_CODE, codes).to(torch.uint8)
    return codes, nested_absmax, code, offset


def _encode_double(absmax: Tensor) -> Encoded:
    encoded: Encoded = torch.ops.fourbit.double_quantize(absmax, dynamic_map(absmax.device))
    return encoded


FLOAT32 = ScaleFormat("float32", None, lambda absmax: (absmax, None, None, None))
DOUBLE = ScaleFormat("double-quantized", dynamic_map, _encode_double)


@subnormals_kept
def decode(
    absmax: Tensor,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """Scales of any format as float32, in the shape of `absmax`, which starts with scale number `first` of all."""
    if nested_absmax is None or nested_code is None or nested_offset is None:
        return absmax
    flat = absmax.reshape(-1)
    group = torch.arange(first, first + flat.numel(), device=flat.device) // NESTED_BLOCKSIZE
    return (nested_code[flat.int()] * nested_absmax.reshape(-1)[group] + nested_offset).view(absmax.shape)
