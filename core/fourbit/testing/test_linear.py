"""linear_4bit and linear_4bit_grad: within the error that float32 accumulation allows, for every shape."""

from __future__ import annotations

import pytest
import torch

import fourbit
from fourbit.testing.inputs import BLOCKSIZES, CODEBOOKS, DTYPES, normal
from fourbit.testing.oracle import assert_product, make_weight

COVERS = ("linear_4bit", "linear_4bit_grad")

SHAPES = (
    (1, 1),
    (1, 64),
    (64, 1),
    (2, 3),
    (7, 63),
    (64, 64),
    (33, 65),
    (96, 80),
    (17, 129),
    (40, 512),
    (5, 1000),
    (301, 33),
)
"""(out, in): ragged ones, blocks that run across rows, one row, one column."""

ROWS = (1, 2, 3, 4, 7, 8, 9, 16, 17, 33)
"""Of x: around the sizes at which a backend changes its kernel."""

PREFILL = (129, 300, 513, 640, 1100, 2100, 4100)
"""Rows of x of whole prompts: past each built-in backend's last change of kernel, split of the rows, and threads."""

double = pytest.mark.parametrize("double_quant", (False, True), ids=("plain", "double"))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def forward(x, weight, dtype, bias=None, message=""):
    """Run linear_4bit with all checks on the result."""
    device = x.device
    nested = weight.nested_args(device) or (None, None, None)
    out = torch.ops.fourbit.linear_4bit(x, *weight.args(device), weight.shape[0], *nested, bias)
    assert out.device == device
    assert_product(out, x, weight.dense().T, dtype, bias)


def backward(grad, weight, dtype):
    """Run linear_4bit_grad with all checks on the result."""
    device = grad.device
    args = (*weight.args(device), weight.shape[1], *weight.nested_args(device))
    out = torch.ops.fourbit.linear_4bit_grad(grad, *args)
    assert out.device == device
    assert_product(out, grad, weight.dense(), dtype)


@double
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(need, device, shape, dtype, double_quant):
    need("linear_4bit", dtype, double_quant=double_quant)
    weight = make_weight(*shape, double_quant=double_quant)
    for rows in (1, 2, 5, 33):
        forward(normal(rows, shape[1], seed=rows).to(device, dtype), weight, dtype)


@double
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grad_shapes(need, device, shape, dtype, double_quant):
    need("linear_4bit_grad", dtype, double_quant=double_quant)
    weight = make_weight(*shape, double_quant=double_quant)
    for rows in (1, 2, 5, 33):
        backward(normal(rows, shape[0], seed=rows).to(device, dtype), weight, dtype)


@every_dtype
@pytest.mark.parametrize("rows", ROWS)
def test_bias(need, device, rows, dtype):
    """Each row of the result gets the bias, however many rows there are."""
    need("linear_4bit", dtype)
    weight = make_weight(70, 128)
    bias = normal(70, seed=3).to(device, dtype) * 50
    forward(normal(rows, 128).to(device, dtype), weight, dtype, bias)


@double
@every_dtype
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize(need, device, blocksize, dtype, double_quant):
    for op in COVERS:
        need(op, dtype, blocksize, double_quant)
    for shape in ((24, 160), (3, 4096)):
        weight = make_weight(*shape, blocksize=blocksize, double_quant=double_quant)
        for rows in (1, 6):
            forward(normal(rows, shape[1]).to(device, dtype), weight, dtype)
            backward(normal(rows, shape[0]).to(device, dtype), weight, dtype)


@every_dtype
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_every_codebook(need, device, codebook, dtype):
    for op in COVERS:
        need(op, dtype)
    weight = make_weight(48, 192, codebook=codebook)
    for rows in (1, 20):
        forward(normal(rows, 192).to(device, dtype), weight, dtype)
        backward(normal(rows, 48).to(device, dtype), weight, dtype)


@pytest.mark.parametrize("leading", ((), (0,), (1,), (2, 3), (2, 0, 5), (1, 1, 1, 1), (3, 1, 4)), ids=str)
def test_any_leading_dimensions(need, device, leading):
    """x of any number of dimensions from 1, also with no rows at all."""
    for op in COVERS:
        need(op)
    weight = make_weight(10, 96)
    forward(normal(*leading, 96).to(device), weight, torch.float32, normal(10).to(device))
    backward(normal(*leading, 10).to(device), weight, torch.float32)


def test_not_contiguous_and_unaligned(need, device):
    for op in COVERS:
        need(op)
    weight = make_weight(32, 66)
    base = normal(70, 140).to(device)
    for x in (base.T[:140, :66], base[::5, 1:67], base[:1, 3:69].expand(9, 66), base[:, :132:2]):
        forward(x, weight, torch.float32)
        backward(x[..., 4:36], weight, torch.float32)
    shifted = base.view(-1)[1 : 1 + 5 * 66].view(5, 66)
    forward(shifted, weight, torch.float32)
    forward(base[:5, :66], weight, torch.float32, bias=base[:32, 7])


@every_dtype
def test_columns_are_told_apart(need, device, dtype):
    """With one-hot rows the result is the weight itself, so that an element in the wrong place shows."""
    for op in COVERS:
        need(op, dtype)
    weight = make_weight(20, 70)
    for count in (1, 70):
        forward(torch.eye(70)[:count].to(device, dtype), weight, dtype)
    for count in (1, 20):
        backward(torch.eye(20)[:count].to(device, dtype), weight, dtype)


@every_dtype
def test_large_and_small_magnitudes(need, device, dtype):
    need("linear_4bit", dtype)
    values = normal(24, 256) * 10.0 ** torch.linspace(-3, 2, 24)[:, None]
    weight = make_weight(24, 256, values=values)
    for scale in (1e-3, 1.0, 10.0):
        forward((normal(4, 256) * scale).to(device, dtype), weight, dtype)


def test_non_finite_blocks_spoil_their_rows_only(need, device):
    """A NaN weight makes the outputs that use it NaN, never a number; the others are right."""
    need("linear_4bit")
    values = normal(8, 128)
    values[2, 5], values[5, 100] = torch.nan, torch.inf
    weight = make_weight(8, 128, values=values)
    for rows in (1, 12):
        x = normal(rows, 128).to(device)
        out = torch.ops.fourbit.linear_4bit(x, *weight.args(device), 8).cpu()
        bad = torch.tensor([2, 5])
        assert bool(out[:, bad].isnan().all())
        good = torch.tensor([0, 1, 3, 4, 6, 7])
        assert_product(out[:, good], x, weight.dense()[good].T, torch.float32)


@every_dtype
def test_large(need, device, dtype):
    """More elements than any one piece of work holds: 1200 x 4096 and 4096 x 1200."""
    for op in COVERS:
        need(op, dtype, double_quant=True)
    for shape in ((1200, 4096), (4096, 1200)):
        weight = make_weight(*shape, double_quant=True)
        for rows in (1, 4):
            forward(normal(rows, shape[1]).to(device, dtype), weight, dtype)
            backward(normal(rows, shape[0]).to(device, dtype), weight, dtype)


@double
@every_dtype
@pytest.mark.parametrize("rows", PREFILL)
def test_prefill(need, device, rows, dtype, double_quant):
    """As many rows as prompts have, also in a batch; the weight is small, so that it takes no time."""
    for op in COVERS:
        need(op, dtype, double_quant=double_quant)
    for n, k in ((40, 128), (33, 70)):
        weight = make_weight(n, k, double_quant=double_quant)
        forward(normal(rows, k, seed=rows).to(device, dtype), weight, dtype, normal(n).to(device, dtype))
        backward(normal(2, -(-rows // 2), n, seed=rows).to(device, dtype), weight, dtype)


def test_public_function(need, device):
    """fourbit.linear_4bit passes on what the state holds, nested scales and bias too."""
    need("linear_4bit", double_quant=True)
    weight = make_weight(30, 90, double_quant=True)
    x, bias = normal(4, 90).to(device), normal(30).to(device)
    out = fourbit.linear_4bit(x, weight.packed.to(device), weight.state(device), bias)
    assert_product(out, x, weight.dense().T, torch.float32, bias)
