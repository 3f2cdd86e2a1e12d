"""Every kernel, executed instruction by instruction: bits as the reference's, products within their error bounds."""

from __future__ import annotations

import pytest
import torch

from fourbit import reference
from fourbit.codebooks import dynamic_map
from fourbit.testing.inputs import CODEBOOKS, PLAIN, beside_thresholds, non_finite, normal
from fourbit.testing.oracle import assert_product, assert_same_bits, make_weight, nested_scales
from tests.rocm.gcn import tiers

REFERENCE = reference.backend
BOTH_WAVES = ("gfx90a", "gfx1030")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RAGGED = (1, 2, 127, 128, 4095, 5003)

# The newer architectures are executed in one dtype each, and together in all: what differs is the instructions.
EVERYWHERE = [(arch, dtype) for arch in BOTH_WAVES for dtype in DTYPES] + [
    ("gfx942", torch.bfloat16),
    ("gfx950", torch.float16),
    ("gfx1100", torch.float16),
    ("gfx1100", torch.bfloat16),
    ("gfx1201", torch.bfloat16),
    ("gfx1201", torch.float32),
]
EACH_ARCH = (
    ("gfx90a", torch.bfloat16),
    ("gfx1030", torch.float32),
    ("gfx942", torch.bfloat16),
    ("gfx950", torch.float16),
    ("gfx1100", torch.float16),
    ("gfx1201", torch.bfloat16),
)
EACH_WAVE = EACH_ARCH[:2]


def some(values, quick):
    """Parameter sets, of which a short run takes those in `quick`."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=() if value in quick else pytest.mark.long
        )
        for value in values
    ]


everywhere = pytest.mark.parametrize(("arch", "dtype"), some(EVERYWHERE, EACH_ARCH), ids=str)
everywhere_in_short = pytest.mark.parametrize(("arch", "dtype"), some(EVERYWHERE, EACH_WAVE), ids=str)


def values(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal deviates of very different magnitudes from block to block."""
    scale = 2.0 ** torch.linspace(-6, 6, -(-count // 32)).repeat_interleave(32)[:count]
    return (normal(count, seed=seed) * scale).to(dtype)


def assert_quantizes(backend, w, book, blocksize):
    packed, absmax = backend.quantize_4bit(w, book.tensor(), blocksize, book.signed_scale)
    want_packed, want_absmax = REFERENCE.quantize_4bit(w, book.tensor(), blocksize, book.signed_scale)
    assert_same_bits(absmax, want_absmax, "absmax")
    assert_same_bits(packed, want_packed, "packed")


@everywhere
@pytest.mark.parametrize("blocksize", some((64, 128), (64,)))
def test_quantize(arch, dtype, blocksize, on):
    backend = on(arch)
    for count in RAGGED:
        assert_quantizes(backend, values(count, dtype), CODEBOOKS["nf4"], blocksize)
    assert [launch[0] for launch in backend.emulator.launches[-len(RAGGED) :]] == ["quantize_4bit"] * len(RAGGED)


@pytest.mark.parametrize("arch", BOTH_WAVES)
@pytest.mark.parametrize("codebook", some(CODEBOOKS, ("fp4",)))
def test_quantize_with_every_codebook(arch, codebook, on):
    backend = on(arch)
    assert_quantizes(backend, values(1500, torch.float32), CODEBOOKS[codebook], 64)
    assert_quantizes(backend, beside_thresholds(CODEBOOKS[codebook], 128)[:4096], CODEBOOKS[codebook], 128)


@pytest.mark.parametrize("arch", BOTH_WAVES)
@pytest.mark.parametrize("blocksize", some((32, 256, 512, 1024, 2048, 4096), (512,)))
def test_quantize_with_every_blocksize(arch, blocksize, on):
    assert_quantizes(on(arch), values(2 * blocksize + 77, torch.bfloat16), CODEBOOKS["nf4"], blocksize)


@pytest.mark.parametrize(
    ("arch", "dtype"),
    some(
        [(arch, torch.float32) for arch in BOTH_WAVES] + [(arch, torch.bfloat16) for arch in tiers.NEW_ARCHS],
        (("gfx942", torch.bfloat16),),
    ),
    ids=str,
)
def test_quantize_what_hurts(arch, dtype, on):
    """Subnormals, the largest floats, ties, NaN and Inf: the ways around 1/absmax, and division itself."""
    backend = on(arch)
    for make in PLAIN.values():
        assert_quantizes(backend, make(300).to(dtype), CODEBOOKS["nf4"], 64)
    assert_quantizes(backend, non_finite(128)[0].to(dtype), CODEBOOKS["nf4"], 128)


@everywhere_in_short
@pytest.mark.parametrize(
    ("blocksize", "double_quant"),
    some([(64, False), (64, True), (128, False), (128, True)], ((64, False), (128, True))),
    ids=("64-plain", "64-double", "128-plain", "128-double"),
)
def test_dequantize(arch, dtype, blocksize, double_quant, on):
    backend = on(arch)
    for count in RAGGED + (8 * 256 * 4 + 3,):
        weight = make_weight(count, blocksize=blocksize, double_quant=double_quant, values=values(count, torch.float32))
        args = (weight.weight(), (count,), dtype)
        assert_same_bits(backend.dequantize_4bit(*args), REFERENCE.dequantize_4bit(*args), f"{count} values")


@everywhere_in_short
def test_embedding(arch, dtype, on):
    backend = on(arch)
    for dim, double_quant in ((64, False), (70, True), (8, False)):
        weight = make_weight(23, dim, blocksize=64, double_quant=double_quant)
        ids = torch.tensor([[3, 0, 22], [7, 7, 1]])
        args = (weight.weight(), 23, dim, dtype)
        for each in (ids, ids.int()):
            assert_same_bits(backend.embedding_4bit(each, *args), REFERENCE.embedding_4bit(each, *args), f"{dim}")


@everywhere_in_short
def test_blockwise(arch, dtype, on):
    backend, code = on(arch), dynamic_map()
    for count in (1, 300, 2500):
        x = values(count, dtype)
        codes, absmax = backend.quantize_blockwise(x, code, 256)
        want_codes, want_absmax = REFERENCE.quantize_blockwise(x, code, 256)
        assert_same_bits(codes, want_codes, "codes")
        assert_same_bits(absmax, want_absmax, "absmax")
        args = (codes, absmax, code, 256, dtype)
        assert_same_bits(backend.dequantize_blockwise(*args), REFERENCE.dequantize_blockwise(*args), "values")


def check_linear(backend, dtype, m, n, k, blocksize, double_quant, bias=True):
    weight = make_weight(n, k, blocksize=blocksize, double_quant=double_quant, seed=m)
    x, b = normal(m, k, seed=n).to(dtype), normal(n).to(dtype) if bias else None
    y = backend.linear_4bit(x, weight.weight(), n, b)
    assert_product(y, x, weight.dense().T, dtype, b)
    return backend.emulator.launches[-1][0]


@everywhere
def test_linear(arch, dtype, on):
    """One to sixteen rows, N and K that fill no tile, K across blocks, every kind of scales."""
    backend = on(arch)
    matrix = arch.startswith("gfx9") and dtype != torch.float32 and (arch, dtype) != ("gfx90a", torch.float16)
    fused = "linear_mfma" if matrix else "linear_vector"
    for m, n, k, blocksize, double_quant in (
        (1, 40, 512, 64, False),
        (3, 33, 320, 128, True),
        (16, 17, 576, 64, True),
        (9, 5, 192, 128, False),
    ):
        assert check_linear(backend, dtype, m, n, k, blocksize, double_quant, bias=m != 9) == fused
    assert check_linear(backend, dtype, 2, 9, 328, 128, False) == "linear_vector"  # K of no matrix tile
    assert check_linear(backend, dtype, 2, 19, 192, 32, False) == "linear_vector"  # two blocks in a tile
    assert check_linear(backend, dtype, 2, 19, 190, 64, False) == "dequantize_4bit"  # words across rows
    assert check_linear(backend, dtype, 17, 20, 128, 64, True) == "dequantize_4bit"


@pytest.mark.parametrize(
    ("arch", "dtype", "rows", "fit"),  # rows of the weight that a workgroup takes at a time; workgroups that fit a unit
    some(
        (
            ("gfx90a", torch.float16, 16, 2),
            ("gfx90a", torch.bfloat16, 16, 3),
            ("gfx950", torch.bfloat16, 16, 8),
            ("gfx1030", torch.bfloat16, 32, 4),
            ("gfx1100", torch.float16, 32, 4),
        ),
        (("gfx90a", torch.bfloat16, 16, 3), ("gfx1030", torch.bfloat16, 32, 4)),
    ),
    ids=str,
)
def test_a_product_fills_the_device_once(arch, dtype, rows, fit, on):
    """As many workgroups as the device holds, each with tile after tile, and never more than there are tiles."""
    for units, tiles in ((1, fit + 2), (2, 2 * fit + 1), (2, 2)):
        backend = on(arch, units=units)
        check_linear(backend, dtype, 1, rows * tiles - 3, 64, 64, False)
        assert backend.emulator.launches[-1][1] == (min(tiles, units * fit), 1, 1)


@pytest.mark.parametrize("m", some(range(1, 17), (5, 16)))
def test_every_number_of_rows(m, on):
    check_linear(on("gfx90a"), torch.float16, m, 35, 128, 64, False)
    check_linear(on("gfx1030"), torch.bfloat16, m, 11, 264, 64, False)


@everywhere_in_short
def test_gradient(arch, dtype, on):
    backend = on(arch)
    for n, k, double_quant in ((24, 72, False), (17, 130, True)):
        weight = make_weight(n, k, blocksize=64, double_quant=double_quant)
        grad = normal(3, n).to(dtype)
        result = backend.linear_4bit_grad(grad, weight.weight(), k)
        assert_product(result, grad, weight.dense(), dtype)


@pytest.mark.parametrize("arch", BOTH_WAVES)
def test_large_products_come_in_pieces(arch, on):
    """With so small a cache, and so few rows of x, that the weight is decoded in two parts."""
    from dataclasses import replace

    backend = on(arch)
    backend.props = replace(backend.props, l2_bytes=4096, sm_count=1)
    n, k = 300, 456
    weight = make_weight(n, k, blocksize=64)
    x = normal(150, k)
    before = len(backend.emulator.launches)
    y = backend.linear_4bit(x, weight.weight(), n)
    assert len(backend.emulator.launches) - before > 1
    assert_product(y, x, weight.dense().T, torch.float32)


@pytest.mark.parametrize("arch", BOTH_WAVES)
def test_tensors_at_odd_addresses(arch, on):
    """Views that begin between words take the ways for them."""
    backend, book = on(arch), CODEBOOKS["nf4"]
    w = values(1001, torch.bfloat16)[1:]
    assert_quantizes(backend, w, book, 64)
    weight = make_weight(32, 64)
    shifted = torch.cat([weight.packed.view(-1)[:1], weight.packed.view(-1)])[1:]
    odd = weight.weight()._replace(packed=shifted)
    want = REFERENCE.dequantize_4bit(weight.weight(), (32, 64), torch.float16)
    assert_same_bits(backend.dequantize_4bit(odd, (32, 64), torch.float16), want, "from an odd address")
    x = normal(2, 65).half().view(-1)[1:129].view(2, 64)
    assert_product(backend.linear_4bit(x, odd, 32), x, weight.dense().T, torch.float16)


@pytest.mark.parametrize("arch", BOTH_WAVES)
@pytest.mark.parametrize("seed", some(range(3), (0,)))
def test_the_order_of_waves_does_not_matter(arch, seed, on):
    """Waves in random order, registers and LDS with other garbage: the same bits."""
    backend = on(arch)
    orderly = backend.emulator.schedule
    backend.emulator.schedule, backend.emulator.seed = seed, seed + 7
    try:
        assert_quantizes(backend, values(3001, torch.float16), CODEBOOKS["fp4"], 4096)
        assert_quantizes(backend, values(900, torch.float32), CODEBOOKS["unordered"], 64)
        check_linear(backend, torch.float16, 2, 35, 512, 64, True)
        check_linear(backend, torch.float32, 2, 9, 256, 64, True)
    finally:
        backend.emulator.schedule = orderly


def test_nested_scales_made_on_the_device(on):
    """Double quantization itself, through quantize_blockwise."""
    from fourbit import scales

    backend, absmax = on("gfx90a"), values(700, torch.float32).abs()
    for got, want in zip(
        scales.double_quantize(absmax, dynamic_map(), backend.quantize_blockwise),
        nested_scales(absmax),
        strict=True,
    ):
        assert_same_bits(got, want, "nested scales")


def test_architectures_cover_both_wave_sizes():
    assert {arch for arch, _ in EVERYWHERE} == set(tiers.ARCHS)
