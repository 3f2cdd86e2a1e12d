"""quantize_4bit_scaled: the codes for scales that are given in place of absmax."""

from __future__ import annotations

import pytest
import torch

import fourbit
from fourbit.testing import inputs
from fourbit.testing.inputs import BLOCKSIZES, CODEBOOKS, DTYPES, normal
from fourbit.testing.oracle import REFERENCE, assert_same_bits

COVERS = ("quantize_4bit_scaled",)


def quantize(w: torch.Tensor, code: torch.Tensor, blocksize: int, scales: torch.Tensor, device: torch.device):
    """The backend's `(packed, scales)`, compared with the reference's."""
    arguments = (code.to(device), blocksize, scales.to(device))
    packed, used = torch.ops.fourbit.quantize_4bit_scaled(w.to(device), *arguments)
    want_packed, want_used = REFERENCE.quantize_4bit_scaled(w, code, blocksize, scales)
    assert_same_bits(packed, want_packed, "packed")
    assert_same_bits(used, want_used, "scales")
    return packed.cpu(), used.cpu()


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("name", inputs.PLAIN)
def test_absmax_given_is_plain_quantization(need, device, name, codebook):
    """Bit for bit, ties and subnormal scales included, where the sign of a scale is the codebook's too."""
    need("quantize_4bit")
    need("quantize_4bit_scaled")
    w, book = inputs.PLAIN[name](5 * 64 + 7), CODEBOOKS[codebook]
    packed, absmax = REFERENCE.quantize_4bit(w, book.tensor(), 64, book.signed_scale)
    again, used = quantize(w, book.tensor(), 64, absmax, device)
    assert_same_bits(again, packed, "packed")
    assert_same_bits(used, absmax, "scales")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_nearest_by_brute_force(need, device, blocksize, dtype):
    """Of scales below and above absmax; what is beyond the table takes its end."""
    need("quantize_4bit_scaled", dtype, blocksize)
    w = normal(3 * blocksize + 17).to(dtype)
    scales, code = torch.tensor([0.5, 2.0, -1.0, 8.0]), CODEBOOKS["nf4"].tensor()
    packed, _ = quantize(w, code, blocksize, scales, device)
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1).view(-1)[: w.numel()].int()
    each = scales.repeat_interleave(blocksize)[: w.numel()].double()
    values = code.double()[None, :] * each[:, None]
    distance = (values - w.double()[:, None]).abs()
    chosen = distance.gather(1, codes[:, None].long())[:, 0]
    assert bool((chosen <= distance.amin(1) + 1e-6 * each.abs()).all())


def test_a_scale_of_zero(need, device):
    """The code of zero, whatever the block holds."""
    need("quantize_4bit_scaled")
    for book in (CODEBOOKS["nf4"], CODEBOOKS["fp4"]):
        zero = book.values.index(0.0)
        packed, used = quantize(normal(128), book.tensor(), 64, torch.tensor([0.0, 1.0]), device)
        assert bool((packed[:32] == 17 * zero).all()) and not bool((packed[32:] == 17 * zero).all())
        assert used.tolist() == [0, 1]


def test_non_finite_weights(need, device):
    """A block with NaN or Inf dequantizes to NaN, and no other is harmed."""
    need("quantize_4bit_scaled")
    w = normal(5 * 64)
    w[70], w[200], w[300] = torch.nan, torch.inf, -torch.inf
    _, used = quantize(w, CODEBOOKS["nf4"].tensor(), 64, torch.full((5,), 3.0), device)
    assert used.isnan().tolist() == [False, True, False, True, True] and float(used[0]) == 3


@pytest.mark.parametrize("double_quant", (False, True))
def test_codes_are_chosen_against_the_scales_that_are_used(need, device, double_quant):
    """With double quantization those are the decoded ones: quantizing again with them changes no code."""
    for op in ("quantize_4bit_scaled", "quantize_blockwise", "dequantize_blockwise"):
        need(op, blocksize=64 if op.startswith("quantize_4") else 256)
    w, scales = normal(300, 64), normal(300, seed=3).abs() + 1
    options = {"blocksize": 64, "double_quant": double_quant}
    packed, state = fourbit.quantize_4bit(w.to(device), scales=scales.to(device), **options)
    used = state.scales().cpu()
    assert torch.equal(used, scales) != double_quant and torch.allclose(used, scales, rtol=0.05)
    want, _ = REFERENCE.quantize_4bit_scaled(w, CODEBOOKS["nf4"].tensor(), 64, used)
    assert_same_bits(packed, want, "packed")


BAD = {
    "too few": (lambda g: g[:-1], ValueError, "scales must be float32 with 5 elements"),
    "float16": (lambda g: g.half(), ValueError, "scales must be float32"),
    "elsewhere": (lambda g: g.to("meta"), ValueError, "scales is on meta"),
    "NaN": (lambda g: g * torch.nan, ValueError, "scales must be finite"),
    "Inf": (lambda g: g * torch.inf, ValueError, "scales must be finite"),
    "a list": (lambda g: [1.0] * 5, TypeError, "scales must be a tensor, got list"),
}


@pytest.mark.parametrize("double_quant", (False, True))
@pytest.mark.parametrize("fault", BAD)
def test_bad_scales(need, device, fault, double_quant):
    need("quantize_4bit_scaled")
    make, error, message = BAD[fault]
    w, scales = normal(5, 64).to(device), torch.ones(5, device=device)
    with pytest.raises(error, match=f"quantize_4bit.*: {message}"):
        fourbit.quantize_4bit(w, blocksize=64, double_quant=double_quant, scales=make(scales))


def test_vmap_is_one_by_one(need, device):
    need("quantize_4bit_scaled")
    w, scales = normal(3, 128).to(device), (normal(3, 2, seed=4).abs() + 1).to(device)
    code = CODEBOOKS["nf4"].tensor(device)
    packed, used = torch.func.vmap(lambda w, s: torch.ops.fourbit.quantize_4bit_scaled(w, code, 64, s))(w, scales)
    for each in range(3):
        one, one_used = torch.ops.fourbit.quantize_4bit_scaled(w[each], code, 64, scales[each])
        assert torch.equal(packed[each], one) and torch.equal(used[each], one_used)
