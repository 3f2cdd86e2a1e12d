"""Products by decoded pieces, with the decoding kernels done by torch on the CPU."""

from __future__ import annotations

import ctypes

import pytest
import torch

from fourbit.testing.oracle import assert_product, make_weight
from fourbit_gpu import pieces
from fourbit_gpu.device import DeviceProps
from fourbit_gpu.elementwise import DTYPE_CODES

TYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
DEVICE = DeviceProps(0, "made up", 80, 4, 1 << 20, 1 << 16)


def memory(address, count, dtype):
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.frombuffer((ctypes.c_uint8 * (count * size)).from_address(address), dtype=dtype)


def decode(source, absmax, code, index, shift, nested, nested_code, nested_offset):
    """Elements `index` of a weight, as float32."""
    count = int(index.max()) + 1
    packed = memory(source, (count + 1) // 2, torch.uint8).int()
    codes = torch.where(index % 2 == 0, packed[index // 2] >> 4, packed[index // 2] & 15)
    blocks = index >> shift
    if nested:
        scales = memory(absmax, int(blocks.max()) + 1, torch.uint8).int()[blocks]
        groups = memory(nested, int(blocks.max()) // 256 + 1, torch.float32)[blocks // 256]
        scales = memory(nested_code, 256, torch.float32)[scales] * groups + memory(nested_offset, 1, torch.float32)
    else:
        scales = memory(absmax, int(blocks.max()) + 1, torch.float32)[blocks]
    return memory(code, 16, torch.float32)[codes] * scales


class Decoding:
    """A launcher that does what dequantize.cu and dequantize_slice.cu do, and counts."""

    props = DEVICE

    def __init__(self):
        self.launches = 0

    def launch(self, spec, grid, threads, shared_bytes, args):
        self.launches += 1
        dtype = TYPES[dict(spec.defines)["DTYPE"]]
        if spec.name == "dequantize_4bit":
            source, absmax, code, out, count, shift, *nested, _ = args
            index = torch.arange(count)
        else:
            source, absmax, code, out, rows, k, first, width, shift, *nested, _ = args
            count = rows * width
            index = (torch.arange(rows)[:, None] * k + torch.arange(first, first + width)).view(-1)
        memory(out, count, dtype).copy_(decode(source, absmax, code, index, shift, *nested))


@pytest.fixture
def narrow(monkeypatch):
    """Pieces of a number of columns, rather than as many as a cache holds."""

    def of(step):
        monkeypatch.setattr(pieces, "piece_columns", lambda props, m, columns, *rest, whole: min(columns, step))

    pieces._rows.cache_clear()
    pieces._columns.cache_clear()
    yield of
    pieces._rows.cache_clear()
    pieces._columns.cache_clear()


N, K = 160, 256
WHOLE = 64
"""Rows that end with a group of nested scales: 256 of 64 weights each."""


@pytest.mark.parametrize("nested", (False, True), ids=("plain", "nested"))
@pytest.mark.parametrize("step", (16, 48, 1000))
@pytest.mark.parametrize("shape", ((5,), (2, 3), ()), ids=str)
def test_products(narrow, nested, step, shape):
    """Also where the last piece is smaller."""
    narrow(step)
    made = make_weight(N, K, double_quant=nested)
    rows = -(-step // WHOLE) * WHOLE if nested else step
    for dtype in (torch.float32, torch.bfloat16):
        dense = made.dense(dtype)
        for bias in (None, torch.randn(N).to(dtype)):
            launcher, x = Decoding(), torch.randn(*shape, K).to(dtype)
            y = pieces.linear(launcher, x, made.weight(), N, bias)
            assert y.shape == (*shape, N) and y.is_contiguous()
            assert_product(y, x, dense.T, dtype, bias)
            assert launcher.launches == -(-N // rows)
        launcher, grad = Decoding(), torch.randn(*shape, N).to(dtype)
        to_x = pieces.linear_grad(launcher, grad, made.weight(), K)
        assert to_x.shape == (*shape, K) and to_x.is_contiguous()
        assert_product(to_x, grad, dense, dtype)
        assert launcher.launches == -(-K // step)


@pytest.mark.parametrize("step", (16, 1000))
@pytest.mark.parametrize("shape", ((5, K), (2, 3, K)), ids=str)
def test_results_are_no_views(narrow, step, shape):
    """Which autograd would have to make anew, so that they can be added to in place."""
    narrow(step)
    with torch.no_grad():
        y = pieces.linear(Decoding(), torch.randn(shape), make_weight(N, K).weight(), N, None)
    assert not y._is_view()
