"""grouped_linear_4bit and its gradient: each expert's weight on its own rows, and nothing on the rest."""

from __future__ import annotations

import pytest
import torch

import fourbit
from fourbit.testing.inputs import DTYPES, normal
from fourbit.testing.oracle import Sample, assert_product, make_weight

COVERS = ("grouped_linear_4bit", "grouped_linear_4bit_grad")

OFFSETS = {
    "even": (4, 8, 12, 16),
    "uneven": (1, 9, 11, 16),
    "empty experts": (0, 7, 7, 16),
    "one expert takes all": (0, 16, 16, 16),
    "rows after the last offset": (2, 3, 5, 6),
    "no rows": (0, 0, 0, 0),
}


def check(op: str, x: torch.Tensor, offsets: torch.Tensor, weight: Sample, dtype: torch.dtype) -> None:
    """Compare each expert's rows with its product, and want zeros in the rest."""
    device = x.device
    grad = op.endswith("grad")
    width = weight.shape[2 if grad else 1]
    args = (*weight.args(device), width, *weight.nested_args(device))
    out = getattr(torch.ops.fourbit, op)(x, offsets.to(device), *args)
    assert out.shape == (x.shape[0], width) and out.dtype == dtype and out.device == device
    start = 0
    for w, end in zip(weight.dense(), offsets.tolist(), strict=True):
        assert_product(out[start:end], x[start:end], w if grad else w.T, dtype)
        start = max(start, end)
    assert not bool(out[start:].any()), "rows after the last offset are not zero"


@pytest.mark.parametrize("op", COVERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OFFSETS)
def test_offsets(need, device, name, dtype, op):
    need(op, dtype)
    weight = make_weight(4, 24, 64)
    x = normal(16, 24 if op.endswith("grad") else 64).to(device, dtype)
    for kind in (torch.int32, torch.int64):
        check(op, x, torch.tensor(OFFSETS[name], dtype=kind), weight, dtype)


@pytest.mark.parametrize("op", COVERS)
@pytest.mark.parametrize("double_quant", (False, True), ids=("plain", "double"))
@pytest.mark.parametrize("shape", ((1, 8, 64), (3, 7, 11), (5, 1, 33), (4, 33, 1), (3, 16, 48), (40, 32, 32)), ids=str)
def test_shapes(need, device, shape, double_quant, op):
    """Also experts that begin in the middle of a block, or of a byte."""
    for blocksize in (32, 256):
        need(op, torch.float32, blocksize, double_quant)
        weight = make_weight(*shape, blocksize=blocksize, double_quant=double_quant)
        offsets = (torch.arange(shape[0]) + 1) * 2
        x = normal(int(offsets[-1]) + 3, shape[1] if op.endswith("grad") else shape[2]).to(device)
        check(op, x, offsets, weight, torch.float32)


PREFILL = {
    "300 rows": (0, 140, 290, 300),
    "900 rows": (700, 701, 701, 899),
    "2100 rows": (650, 650, 1500, 2090),
    "2100 rows, all of one": (0, 0, 2100, 2100),
}


@pytest.mark.parametrize("op", COVERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PREFILL)
def test_prefill(need, device, name, dtype, op):
    """Experts with as many rows as prompts give them, beside others with few or none."""
    need(op, dtype)
    offsets = torch.tensor(PREFILL[name])
    for shape in ((4, 24, 64), (4, 7, 33)):
        weight = make_weight(*shape)
        x = normal(int(name.split()[0]), shape[1 if op.endswith("grad") else 2]).to(device, dtype)
        check(op, x, offsets, weight, dtype)


def test_gradient(need, device):
    """Autograd of the public function, against autograd of the dequantized experts."""
    for op in COVERS:
        need(op)
    weight = make_weight(3, 10, 64)
    offsets = torch.tensor([2, 2, 7])
    x = normal(8, 64).to(device).requires_grad_()
    upstream = normal(8, 10, seed=5).to(device)
    out = fourbit.grouped_linear_4bit(x, offsets.to(device), weight.packed.to(device), weight.state(device))
    (grad,) = torch.autograd.grad(out, x, upstream)
    dense = weight.dense()
    assert_product(grad[:2], upstream[:2], dense[0], torch.float32)
    assert_product(grad[2:7], upstream[2:7], dense[2], torch.float32)
    assert not bool(grad[7:].any())


@pytest.mark.parametrize(
    ("offsets", "error"),
    (
        ([3, 2, 5], "offsets"),
        ([1, 2, 99], "offsets"),
        ([-1, 2, 3], "offsets"),
        ([[1, 2, 3]], "offsets"),
        ([1.0, 2.0, 3.0], "offsets"),
        # differences of neighbours that wrap to positive numbers
        ([1000, 2**63 - 1, -(2**63), -1, 3], "offsets"),
        (torch.tensor([1000, 2**31 - 1, -(2**31), -1, 3], dtype=torch.int32), "offsets"),
        ([-(2**63), -1, 0], "offsets"),
        ([2**63 - 1, -(2**63), 3], "offsets"),
    ),
    ids=str,
)
def test_bad_offsets(need, device, offsets, error):
    need("grouped_linear_4bit")
    offsets = torch.as_tensor(offsets)
    weight = make_weight(offsets.shape[-1], 10, 64)
    if device.type != "cpu" and offsets.dim() == 1 and not offsets.is_floating_point():
        pytest.skip("the values of offsets are the caller's business on a device that they would be copied from")
    with pytest.raises((TypeError, ValueError), match=error):
        args = (*weight.args(device), 10)
        torch.ops.fourbit.grouped_linear_4bit(normal(8, 64).to(device), offsets.to(device), *args)
    with pytest.raises((TypeError, ValueError), match=error):
        args = (*weight.args(device), 64)
        torch.ops.fourbit.grouped_linear_4bit_grad(normal(8, 10).to(device), offsets.to(device), *args)


@pytest.mark.parametrize("op", COVERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", (False, True), ids=("plain", "double"))
def test_many_rows(need, device, double_quant, dtype, op):
    """As of a prompt: experts with hundreds of rows beside others with few and none."""
    need(op, dtype, double_quant=double_quant)
    weight = make_weight(6, 136, 192, double_quant=double_quant)
    offsets = torch.tensor([260, 260, 261, 390, 640, 700])
    x = normal(703, 136 if op.endswith("grad") else 192).to(device, dtype)
    check(op, x, offsets, weight, dtype)
