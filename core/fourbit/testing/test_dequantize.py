"""dequantize_4bit: the same bits as the reference in every dtype."""

from __future__ import annotations

import pytest
import torch

import fourbit
from fourbit.testing import inputs
from fourbit.testing.inputs import BLOCKSIZES, CODEBOOKS, DTYPES, generator, normal
from fourbit.testing.oracle import REFERENCE, Sample, assert_same_bits, make_weight, nested_scales

COVERS = ("dequantize_4bit",)


def check(weight: Sample, device: torch.device, dtype: torch.dtype) -> None:
    """Compare the backend's dequantized weight with the reference's."""
    args, nested = weight.args(device), weight.nested_args(device)
    out = torch.ops.fourbit.dequantize_4bit(*args, weight.shape, dtype, *nested)
    assert out.device == device and out.is_contiguous()
    assert_same_bits(out, weight.dense(dtype), f"{weight.codebook.name}, blocksize {weight.blocksize}, {dtype}")


def random_weight(count: int, codebook: str, blocksize: int, double_quant: bool) -> Sample:
    """Random bytes, so that every code occurs, with scales of many magnitudes."""
    packed = torch.randint(0, 256, (-(-count // 2), 1), dtype=torch.uint8, generator=generator())
    absmax = normal(-(-count // blocksize)).exp()
    if CODEBOOKS[codebook].signed_scale:
        absmax[::2] *= -1
    nested = ()
    if double_quant:
        absmax, *nested = nested_scales(absmax)
    return Sample(CODEBOOKS[codebook], (count,), blocksize, packed, absmax, tuple(nested))


@pytest.mark.parametrize("double_quant", (False, True), ids=("plain", "double"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize(need, device, blocksize, dtype, double_quant):
    need("dequantize_4bit", dtype, blocksize, double_quant)
    for codebook in CODEBOOKS:
        check(random_weight(5 * blocksize + 33, codebook, blocksize, double_quant), device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", inputs.PLAIN)
def test_same_bits(need, device, name, dtype):
    """Scales at the ends of float32, which overflow or vanish in 16 bits; one rounding, to nearest even."""
    need("dequantize_4bit", dtype)
    count = 5 * 64 + 7
    for codebook in ("nf4", "fp4", "signed"):
        check(make_weight(count, codebook=codebook, values=inputs.PLAIN[name](count)), device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_scale_of_16_bits(need, device, dtype):
    """Many scales, so that code value times scale often lies near the middle between two results."""
    need("dequantize_4bit", dtype, 32)
    scales = torch.rand(1 << 13, generator=generator()) + 0.5
    packed = torch.randint(0, 256, (len(scales) * 16, 1), dtype=torch.uint8, generator=generator(1))
    for codebook in ("nf4", "unordered"):
        check(Sample(CODEBOOKS[codebook], (len(scales) * 32,), 32, packed, scales, ()), device, dtype)


@pytest.mark.parametrize("double_quant", (False, True), ids=("plain", "double"))
@pytest.mark.parametrize(
    "shape", ((1,), (1, 1), (3,), (65,), (7, 11), (1, 129), (129, 1), (3, 5, 67), (50, 80)), ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_shapes(need, device, shape, dtype, double_quant):
    """Odd counts; rows that are no multiple of the blocksize, where blocks run across rows."""
    need("dequantize_4bit", dtype, double_quant=double_quant)
    check(make_weight(*shape, double_quant=double_quant), device, dtype)


@pytest.mark.parametrize("shape", ((16, 48), (48, 80), (33, 96)), ids=str)
@pytest.mark.parametrize("blocksize", (64, 128, 1024))
def test_rows_a_multiple_of_16_but_not_of_the_blocksize(need, device, shape, blocksize):
    need("dequantize_4bit", blocksize=blocksize)
    check(make_weight(*shape, blocksize=blocksize), device, torch.float32)


@pytest.mark.parametrize("double_quant", (False, True), ids=("plain", "double"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", (32, 64, 512))
def test_non_finite_blocks_are_nan(need, device, blocksize, dtype, double_quant):
    """A spoilt block dequantizes to NaN, all of it, and no other does, also with double quantization."""
    need("quantize_4bit", blocksize=blocksize)
    need("quantize_blockwise", blocksize=256)
    need("dequantize_4bit", dtype, blocksize, double_quant)
    w, bad = inputs.non_finite(blocksize)
    packed, state = fourbit.quantize_4bit(w.to(device), blocksize=blocksize, double_quant=double_quant)
    good = make_weight(len(w), blocksize=blocksize, values=w)
    out = fourbit.dequantize_4bit(packed, state, dtype).cpu()
    assert torch.equal(out.isnan(), bad), "NaN at other elements than those of the spoilt blocks"
    if not double_quant:
        assert_same_bits(out[~bad], good.dense(dtype)[~bad], "blocks beside spoilt ones")
    assert float((out - w).abs()[~bad].max()) < 0.6


def test_unaligned_and_not_contiguous(need, device):
    need("dequantize_4bit")
    weight = make_weight(20, 64)
    want = weight.dense()
    packed, absmax, code, blocksize = weight.args(device)
    inside = torch.cat([packed.new_zeros(3, 1), packed])[3:]
    strided = packed.repeat_interleave(2, dim=1)[:, :1]
    scales = absmax.repeat_interleave(2)[::2]
    assert not strided.is_contiguous() and not scales.is_contiguous()
    for bytes_, factors in ((inside, absmax), (strided, scales), (packed.view(20, 32), absmax.view(4, 5))):
        out = torch.ops.fourbit.dequantize_4bit(bytes_, factors, code, blocksize, weight.shape, torch.float32)
        assert_same_bits(out, want, "an odd layout of the same bytes")


def test_known_values(need, device):
    need("dequantize_4bit")
    for codebook in ("nf4", "fp4"):
        code = CODEBOOKS[codebook].tensor()
        packed = torch.tensor([0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF], dtype=torch.uint8).view(-1, 1)
        args = (packed.to(device), torch.tensor([2.0]).to(device), code.to(device), 64)
        out = torch.ops.fourbit.dequantize_4bit(*args, (4, 4), torch.float32)
        assert_same_bits(out, (2 * code).view(4, 4), codebook)


def test_large(need, device):
    """2^24 elements and a few."""
    need("dequantize_4bit", torch.bfloat16)
    part = random_weight(1 << 21, "nf4", 64, False)
    scales = torch.cat([part.absmax * factor for factor in torch.logspace(-2, 2, 8)] + [torch.ones(2)])
    packed = torch.cat([part.packed.repeat(8, 1), part.packed[:39]])
    weight = Sample(part.codebook, (8 * (1 << 21) + 77,), 64, packed, scales, ())
    check(weight, device, torch.bfloat16)


def test_reference_agrees_with_the_definition(device):
    """The oracle itself, element by element in plain Python."""
    weight = random_weight(131, "nf4", 32, True)
    nested_absmax, nested_code, offset = weight.nested
    for i, value in enumerate(REFERENCE.dequantize_4bit(weight.weight(), (131,), torch.float32)):
        byte, block = int(weight.packed[i // 2, 0]), i // 32
        nibble = byte >> 4 if i % 2 == 0 else byte & 15
        scale = nested_code[int(weight.absmax[block])] * nested_absmax[block // 256] + offset
        assert value == weight.codebook.tensor()[nibble] * scale
