"""quantize_blockwise and dequantize_blockwise: 8 bits, truly nearest, the reference's bits."""

from __future__ import annotations

import pytest
import torch

import fourbit
from fourbit.codebooks import dynamic_map
from fourbit.testing import inputs
from fourbit.testing.inputs import BLOCKSIZES, DTYPES, generator, normal
from fourbit.testing.oracle import REFERENCE, assert_same_bits

COVERS = ("quantize_blockwise", "dequantize_blockwise")


def check(
    x: torch.Tensor,
    device: torch.device,
    blocksize: int = 256,
    code: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Compare codes and scales, and the way back to `dtype`, with the reference's."""
    table = dynamic_map() if code is None else code
    want_codes, want_absmax = REFERENCE.quantize_blockwise(x.contiguous(), table, blocksize)
    moved = None if code is None else code.to(device)
    codes, absmax = fourbit.quantize_blockwise(x.to(device), code=moved, blocksize=blocksize)
    assert_same_bits(absmax, want_absmax, f"absmax, blocksize {blocksize}")
    assert_same_bits(codes, want_codes, f"codes, blocksize {blocksize}")
    want = REFERENCE.dequantize_blockwise(want_codes, want_absmax, table, blocksize, dtype)
    out = fourbit.dequantize_blockwise(codes, absmax, code=moved, blocksize=blocksize, dtype=dtype)
    assert_same_bits(out, want, f"values in {dtype}, blocksize {blocksize}")


def need_both(need, dtype=torch.float32, blocksize=256, out=torch.float32):
    need("quantize_blockwise", dtype, blocksize)
    need("dequantize_blockwise", out, blocksize)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", inputs.PLAIN)
def test_same_bits(need, device, name, dtype):
    need_both(need, out=dtype)
    check(inputs.PLAIN[name](5 * 256 + 7), device, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize(need, device, blocksize, dtype):
    need_both(need, dtype, blocksize, dtype)
    check(normal(3 * blocksize + 33).to(dtype), device, blocksize, dtype=dtype)


@pytest.mark.parametrize("shape", ((1,), (3,), (1, 1), (5, 7, 11), (257,), (2, 128)), ids=str)
def test_ragged_shapes(need, device, shape):
    need_both(need)
    check(normal(*shape), device)


def test_nearest(need, device):
    """The code taken is as near as any of the 256, searched one by one in float64."""
    need("quantize_blockwise")
    x = torch.cat([normal(1024) ** 5, normal(1024, seed=1)])
    codes, absmax = fourbit.quantize_blockwise(x.to(device))
    table, scale = dynamic_map().double(), absmax.cpu().double().repeat_interleave(256)
    distance = (table[None] * scale[:, None] - x.double()[:, None]).abs()
    taken = distance.gather(1, codes.cpu().long()[:, None])[:, 0]
    excess = taken - distance.min(1).values
    assert float((excess / scale).max()) < 1e-7, "another code is nearer"


def test_beside_thresholds(need, device):
    need_both(need)
    edges = (dynamic_map()[:-1] + dynamic_map()[1:]) * 0.5
    around = [edges]
    for towards in (-2.0, 2.0):
        around.append(torch.nextafter(edges, torch.tensor(towards)))
    for scale in (1.0, 0.3, 2.0**-40):
        blocks = [torch.cat([torch.ones(1), part]) * scale for part in around]  # 256 each, the first the largest
        check(torch.cat(blocks), device)


def test_custom_code(need, device):
    """A table that is not sorted."""
    need_both(need)
    code = torch.linspace(-1, 1, 256)[torch.randperm(256, generator=generator())]
    check(normal(700), device, code=code)


def test_non_finite(need, device):
    need_both(need)
    x, bad = inputs.non_finite(256)
    check(x, device)
    codes, absmax = fourbit.quantize_blockwise(x.to(device))
    assert torch.equal(fourbit.dequantize_blockwise(codes, absmax).cpu().isnan(), bad)


def test_not_contiguous(need, device):
    need_both(need)
    base = normal(40, 60)
    for view in (base.T, base[::2, 1:], base[:1].expand(3, 60)):
        check(view, device)
        codes, _ = fourbit.quantize_blockwise(base.to(device).T)
        assert_same_bits(codes, REFERENCE.quantize_blockwise(base.T.contiguous(), dynamic_map(), 256)[0], "codes")


def test_large(need, device):
    need_both(need)
    check(torch.cat([normal((1 << 20) + 3).repeat(8), normal(9)]), device)
