"""Sizes that end in the middle of everything, at each instruction set: beyond what the conformance suite asks of all.

Every call is one of guarded memory, and of 1, 2 and 3 threads that must agree (server.cpp).
"""

from __future__ import annotations

import random

import pytest
import torch

from fourbit.testing.inputs import BLOCKSIZES, DTYPES, normal
from fourbit.testing.oracle import REFERENCE, assert_product, assert_same_bits, make_weight
from fourbit.weight import Weight
from tests.cpu.native.backend import NativeServerBackend
from tests.cpu.native.builds import VARIANTS
from tests.cpu.native.client import Server

pytestmark = pytest.mark.long  # half a minute for each build
NEAR = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
"""Widths of vectors, tiles and blocks; sizes are these, or one or a few elements off."""


@pytest.fixture(scope="module", params=VARIANTS, ids="-".join)
def backend(request, server_command):
    build, isa = request.param
    with Server(server_command(build, isa), isa) as server:
        yield NativeServerBackend(server)
        assert server.close() == 0


def size(choose: random.Random, most: int) -> int:
    return max(1, min(most, choose.choice(NEAR) + choose.choice((-3, -1, 0, 0, 0, 1, 2, 5, 31))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products(backend, dtype):
    choose = random.Random(str(dtype))
    for index in range(60):
        m, n, k = size(choose, 140), size(choose, 300), size(choose, 520)
        if index % 3 == 0:
            k = max(64, k // 64 * 64)  # rows of whole blocks have a way of their own
        blocksize, double = choose.choice(BLOCKSIZES), choose.random() < 0.4
        weight = make_weight(n, k, blocksize=blocksize, double_quant=double, seed=index)
        x, grad = normal(m, k, seed=index).to(dtype), normal(m, n, seed=index).to(dtype)
        bias = normal(n, seed=5).to(dtype) if choose.random() < 0.5 else None
        assert_product(backend.linear_4bit(x, weight.weight(), n, bias), x, weight.dense().T, dtype, bias)
        assert_product(backend.linear_4bit_grad(grad, weight.weight(), k), grad, weight.dense(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conversions(backend, dtype):
    """Each count to 200, and some about the size of a thread's piece of work."""
    code = make_weight(1, 1).codebook.tensor()
    large = tuple(base + offset for base in (1 << 16, 1 << 17, 3 << 16) for offset in (-33, -1, 0, 1, 64, 77))
    for count in (*range(1, 200, 1 if dtype == torch.float32 else 3), *large):
        blocksize = BLOCKSIZES[count % len(BLOCKSIZES)]
        w = normal(count, seed=count).to(dtype)
        for signed in (False, True):
            packed, absmax = backend.quantize_4bit(w, code, blocksize, signed)
            want = REFERENCE.quantize_4bit(w, code, blocksize, signed)
            assert_same_bits(packed, want[0], f"codes of {count} elements in blocks of {blocksize}")
            assert_same_bits(absmax, want[1], f"scales of {count} elements in blocks of {blocksize}")
        weight = Weight(packed, absmax, code, blocksize)
        out = backend.dequantize_4bit(weight, (count,), dtype)
        assert_same_bits(out, REFERENCE.dequantize_4bit(weight, (count,), dtype), f"{count}")


def test_experts(backend):
    choose = random.Random(7)
    for index in range(20):
        experts, n, k = choose.randint(1, 5), size(choose, 100), size(choose, 200)
        ends = torch.tensor(sorted(choose.randint(0, 30) for _ in range(experts)))
        rows = int(ends[-1]) + choose.randint(0, 3)
        weight = make_weight(experts, n, k, blocksize=choose.choice(BLOCKSIZES), seed=index)
        x = normal(rows, k, seed=index)
        out = backend.grouped_linear_4bit(x, ends, weight.weight(), n)
        start = 0
        for w, end in zip(weight.dense(), ends.tolist(), strict=True):
            assert_product(out[start:end], x[start:end], w.T, torch.float32)
            start = end
        assert not bool(out[start:].any())
