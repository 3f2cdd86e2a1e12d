"""quantize_4bit: the same bytes and the same scales as the reference."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from fourbit.testing import inputs
from fourbit.testing.inputs import BLOCKSIZES, CODEBOOKS, DTYPES, normal
from fourbit.testing.oracle import REFERENCE, assert_same_bits
from fourbit.weight import Weight

COVERS = ("quantize_4bit",)


def check(w: Tensor, device: torch.device, codebook: str = "nf4", blocksize: int = 64, moved: Tensor | None = None):
    """Compare the backend's result for `moved` (default: w on the device) with the reference's for w."""
    book = CODEBOOKS[codebook]
    expected = REFERENCE.quantize_4bit(w.contiguous(), book.tensor(), blocksize, book.signed_scale)
    on_device = w.to(device) if moved is None else moved
    before = on_device.clone()
    packed, absmax = torch.ops.fourbit.quantize_4bit(on_device, book.tensor(device), blocksize, book.signed_scale)
    assert packed.device == device and absmax.device == device
    assert_same_bits(absmax, expected[1], f"absmax ({codebook}, blocksize {blocksize})")
    assert_same_bits(packed, expected[0], f"packed ({codebook}, blocksize {blocksize})")
    assert_same_bits(on_device, before.cpu(), "the input, which must not be written to")


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("name", inputs.PLAIN)
def test_same_bits(need, device, name, codebook):
    need("quantize_4bit")
    check(inputs.PLAIN[name](5 * 64 + 7), device, codebook)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize(need, device, blocksize, dtype, codebook):
    need("quantize_4bit", dtype, blocksize)
    check(normal(5 * blocksize + 33).to(dtype), device, codebook, blocksize)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("blocksize", (32, 256, 4096))
def test_beside_thresholds(need, device, codebook, blocksize):
    """Values exactly at a threshold, and one and two ulps on either side."""
    need("quantize_4bit", blocksize=blocksize)
    check(inputs.beside_thresholds(CODEBOOKS[codebook], blocksize), device, codebook, blocksize)


@pytest.mark.parametrize("codebook", ("nf4", "fp4"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_every_half_precision_value(need, device, dtype, codebook):
    need("quantize_4bit", dtype)
    check(inputs.half_precision_extremes(dtype), device, codebook)


@pytest.mark.parametrize(
    "shape", ((1,), (1, 1), (2,), (3,), (63,), (65,), (7, 11), (1, 129), (129, 1), (3, 5, 67)), ids=str
)
@pytest.mark.parametrize("codebook", ("nf4", "unordered", "signed"))
def test_ragged_shapes(need, device, shape, codebook):
    """Odd counts, padded with the code of zero, and short last blocks."""
    need("quantize_4bit")
    check(normal(*shape), device, codebook)


@pytest.mark.parametrize("blocksize", (32, 64, 1024))
def test_short_last_block(need, device, blocksize):
    """A last block of every kind of length; blocks do not end with rows."""
    need("quantize_4bit", blocksize=blocksize)
    for rest in (1, 2, 15, 16, 17, blocksize // 2, blocksize - 1):
        w = normal(2 * blocksize + rest, seed=rest)
        w[-1] = 9.0  # the last block's largest, in its last element
        check(w, device, blocksize=blocksize)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_contiguous(need, device, dtype):
    need("quantize_4bit", dtype)
    base = normal(65, 130).to(dtype)
    for view in (
        lambda t: t.T,
        lambda t: t[:, ::2],
        lambda t: t[::3, 1:],
        lambda t: t[:1].expand(4, 130),
        lambda t: t.view(13, 5, 130).permute(2, 0, 1),
    ):
        check(view(base), device, moved=view(base.to(device)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned(need, device, dtype):
    """Contiguous, but starting at an address that no vector load likes."""
    need("quantize_4bit", dtype)
    base = normal(64 * 9 + 3).to(dtype)
    for start in (1, 2, 3):
        check(base[start:], device, moved=base.to(device)[start:])


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("blocksize", (32, 64, 512))
def test_non_finite(need, device, blocksize, codebook):
    """A block with NaN or Inf has the scale NaN and the codes of zero; its neighbours are right."""
    need("quantize_4bit", blocksize=blocksize)
    check(inputs.non_finite(blocksize)[0], device, codebook, blocksize)


def test_known_bytes(need, device):
    """Element 2i is the high nibble of byte i; an odd count ends with the code of zero."""
    need("quantize_4bit")
    for codebook, zero in (("nf4", 7), ("fp4", 0)):
        code = CODEBOOKS[codebook].tensor()
        w = torch.cat([code, code[3:4]]).to(device)
        packed, absmax = torch.ops.fourbit.quantize_4bit(w, code.to(device), 64)
        codes = [int(c) if v else zero for c, v in enumerate(code)]  # -0 takes the code of +0
        codes += [3, zero]
        want = [16 * high + low for high, low in zip(codes[::2], codes[1::2], strict=True)]
        assert packed.flatten().tolist() == want, codebook
        assert absmax.tolist() == [1.0]


def test_tiny_values_take_code_zero_in_fp4(need, device):
    need("quantize_4bit")
    w = torch.tensor([1.0, -1e-9, 1e-9, -0.0, -0.001, 0.001, -0.0026, 0.0]).to(device)
    packed, _ = torch.ops.fourbit.quantize_4bit(w, CODEBOOKS["fp4"].tensor(device), 64)
    assert packed.flatten().tolist() == [0x30, 0x00, 0x00, 0x00]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_large(need, device, dtype):
    """2^24 elements and a few, so that no index is 16 or 24 bits wide and work is split up."""
    need("quantize_4bit", dtype)
    part = normal(1 << 20)
    scales = torch.logspace(-3, 3, 16)
    w = torch.cat([*(part * scale for scale in scales), part[:77]]).to(dtype)
    check(w, device)


@pytest.mark.skipif(
    os.environ.get("FOURBIT_TEST_HUGE") != "1",
    reason="more than 2^31 elements: set FOURBIT_TEST_HUGE=1 (takes about 8 GB of memory)",
)
def test_more_than_2_to_the_31_elements(need, device):
    """The end of a weight whose element numbers do not fit in 32 bits, quantized and dequantized."""
    need("quantize_4bit", torch.float16)
    need("dequantize_4bit", torch.float16)
    code, blocksize = CODEBOOKS["nf4"].tensor(), 4096
    count = 2**31 + 3 * blocksize + 5
    tail = normal(5 * blocksize + 5).to(torch.float16)
    w = torch.zeros(count, dtype=torch.float16, device=device)
    w[-len(tail) :] = tail.to(device)
    packed, absmax = torch.ops.fourbit.quantize_4bit(w, code.to(device), blocksize)
    del w
    want_packed, want_absmax = REFERENCE.quantize_4bit(tail, code, blocksize, False)
    assert_same_bits(packed[-len(want_packed) :], want_packed, "the last packed bytes")
    assert_same_bits(absmax[-len(want_absmax) :], want_absmax, "the last scales")
    out = torch.ops.fourbit.dequantize_4bit(packed, absmax, code.to(device), blocksize, [count], torch.float16)
    want = REFERENCE.dequantize_4bit(Weight(want_packed, want_absmax, code, blocksize), tail.shape, torch.float16)
    assert_same_bits(out[-len(tail) :], want, "the last elements")
    assert not bool(out[: 1 << 20].any())
