"""A scale format of another kind on the same kernels: MXFP4 (OCP Microscaling Formats v1.0), by tables alone.

Blocks of 32 elements of E2M1, and a scale of 8 bits, E8M0: 2^(code - 127), NaN for 255. As a `ScaleFormat` the scales'
table has those 256 values, each nested scale is 1 and the offset 0.
"""

from __future__ import annotations

import pytest
import torch

import fourbit
from fourbit.scales import NESTED_BLOCKSIZE, ScaleFormat
from fourbit.testing.inputs import DTYPES, generator, normal
from fourbit.testing.oracle import assert_product, assert_same_bits
from fourbit.weight import Weight

COVERS = ("dequantize_4bit", "linear_4bit", "linear_4bit_grad", "embedding_4bit", "quantize_4bit_scaled")

E2M1 = torch.tensor([sign * value for sign in (1, -1) for value in (0.0, 0.5, 1, 1.5, 2, 3, 4, 6)])


def e8m0_table(device: torch.device) -> torch.Tensor:
    """What each of the 256 codes stands for; that of 0 is subnormal in float32, and exact."""
    return torch.tensor([*(2.0 ** (code - 127) for code in range(255)), torch.nan], device=device)


def encode_e8m0(scales: torch.Tensor):
    """Each scale's own code; they must be powers of two."""
    codes = (torch.frexp(scales).exponent + 126).to(torch.uint8)
    ones = torch.ones(-(-scales.numel() // NESTED_BLOCKSIZE), device=scales.device)
    return codes, ones, e8m0_table(scales.device), torch.zeros((), device=scales.device)


E8M0 = ScaleFormat("e8m0", e8m0_table, encode_e8m0)


def weight(rows: int, k: int, device: torch.device, lowest: int, highest: int) -> tuple[Weight, torch.Tensor]:
    """A weight [rows, k] with scales from 2^lowest to 2^highest, and its values in float64 by another way."""
    count = rows * k
    codes = torch.randint(0, 16, (count + count % 2,), generator=generator(3), dtype=torch.uint8)
    exponents = torch.randint(lowest, highest + 1, (-(-count // 32),), generator=generator(4))
    exponents[0], exponents[-1] = lowest, highest
    absmax, *nested = E8M0.encode(2.0 ** exponents.float())
    assert torch.equal(absmax.int() - 127, exponents.int())
    packed = (codes[0::2] << 4) | codes[1::2]
    magnitude = torch.where(codes & 7 < 2, (codes & 7) * 0.5, (1 + (codes & 1) * 0.5) * 2.0 ** ((codes >> 1 & 3) - 1.0))
    values = torch.where(codes > 7, -magnitude, magnitude).double()[:count]
    dense = torch.ldexp(values.view(-1), exponents.repeat_interleave(32)[:count].double())
    parts = (each.to(device) for each in nested)
    return Weight(packed.to(device), absmax.to(device), E2M1.to(device), 32, *parts), dense.view(rows, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((8, 64), (33, 70), (300, 96)), ids=str)
def test_dequantized_exactly(need, device, shape, dtype):
    """In every dtype one rounding of the exact value; in float32 and bfloat16 there is none but the lowest bits."""
    need("dequantize_4bit", dtype, 32, True)
    mx, dense = weight(*shape, device, *((-14, 12) if dtype is torch.float16 else (-100, 100)))
    out = torch.ops.fourbit.dequantize_4bit(*mx[:4], list(shape), dtype, *mx[4:])
    assert_same_bits(out, dense.to(dtype), f"MXFP4 in {dtype}")
    assert torch.equal(out.cpu().double(), dense)


def test_the_whole_range(need, device):
    """Scales from 2^-127 to 2^127: exact from the subnormal 2^-128 on; from 2^128 on there is no float32 but infinity.

    Products with scales of at most 2^125 are finite: 6 times that is the largest. Code 255 makes its block NaN.
    """
    need("dequantize_4bit", torch.float32, 32, True)
    mx, _ = weight(255, 32, device, -127, 127)
    mx = mx._replace(absmax=torch.arange(255, dtype=torch.uint8, device=device))
    out = torch.ops.fourbit.dequantize_4bit(*mx[:4], [255, 32], torch.float32, *mx[4:]).cpu()
    codes = torch.stack([mx.packed.cpu() >> 4, mx.packed.cpu() & 15], dim=1).view(255, 32)
    exact = torch.ldexp(E2M1.double()[codes.int()], torch.arange(-127, 128)[:, None].double())
    assert_same_bits(out, exact.float(), "MXFP4 with every scale")
    assert bool(out[:253].isfinite().all()) and bool(out[254].isinf().any())
    nan = mx._replace(absmax=torch.full_like(mx.absmax, 255))
    out = torch.ops.fourbit.dequantize_4bit(*nan[:4], [255, 32], torch.float32, *nan[4:])
    assert bool(out.isnan().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", (1, 3, 40))
def test_products(need, device, rows, dtype):
    for op in ("linear_4bit", "linear_4bit_grad", "embedding_4bit"):
        need(op, dtype, 32, True)
    n, k = 48, 128
    mx, dense = weight(n, k, device, -4, 3)
    x, grad = normal(rows, k).to(dtype), normal(rows, n, seed=2).to(dtype)
    ops = torch.ops.fourbit
    assert_product(ops.linear_4bit(x.to(device), *mx[:4], n, *mx[4:]), x, dense.T, dtype)
    assert_product(ops.linear_4bit_grad(grad.to(device), *mx[:4], k, *mx[4:]), grad, dense, dtype)
    ids = torch.arange(rows, device=device) * 7 % n
    assert torch.equal(ops.embedding_4bit(ids, *mx[:4], n, k, dtype, *mx[4:]).cpu().double(), dense[ids.cpu()])


def test_as_a_state(need, device):
    """Through the public functions; a file of bitsandbytes' has no such scales, and none is written."""
    need("linear_4bit", torch.float32, 32, True)
    mx, dense = weight(40, 64, device, -4, 3)
    nested = mx[4:]
    state = fourbit.QuantState(mx.absmax, torch.Size((40, 64)), mx.code, 32, "mxfp4", torch.float32, *nested)
    assert torch.equal(fourbit.dequantize_4bit(mx.packed, state).cpu().double(), dense)
    assert torch.equal(state.scales(), e8m0_table(device)[mx.absmax.int()])
    x = normal(5, 64)
    assert_product(fourbit.linear_4bit(x.to(device), mx.packed, state), x, dense.T, torch.float32)
    with pytest.raises(ValueError, match=r"goes beyond \[-1, 1\], which is no format of bitsandbytes"):
        state.to_state_dict()


def test_quantized_with_given_scales(need, device):
    """The codes of values that MXFP4 holds are found again."""
    need("quantize_4bit_scaled", torch.float32, 32)
    mx, dense = weight(40, 64, device, -4, 3)
    scales = e8m0_table(device)[mx.absmax.int()]
    w = dense.float().to(device)
    packed, used = torch.ops.fourbit.quantize_4bit_scaled(w, mx.code, 32, scales)
    assert torch.equal(used, scales)
    again = mx._replace(packed=packed)
    out = torch.ops.fourbit.dequantize_4bit(*again[:4], [40, 64], torch.float32, *again[4:])
    assert torch.equal(out, w)
