"""embedding_4bit: the rows of the dequantized weight, bit for bit, and never memory that is not its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fourbit
from fourbit.testing.inputs import BLOCKSIZES, CODEBOOKS, DTYPES
from fourbit.testing.oracle import Sample, assert_same_bits, make_weight

COVERS = ("embedding_4bit",)


def check(ids: torch.Tensor, weight: Sample, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Compare rows `ids` with those of the reference's dequantized weight."""
    args = (*weight.args(device), *weight.shape, dtype, *weight.nested_args(device))
    out = torch.ops.fourbit.embedding_4bit(ids.to(device), *args)
    assert out.device == device
    want = weight.dense(dtype)[ids.long()]
    assert_same_bits(out, want, f"rows of a weight {list(weight.shape)}, blocksize {weight.blocksize}, {dtype}")


@pytest.mark.parametrize("double_quant", (False, True), ids=("plain", "double"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", (1, 2, 7, 32, 63, 64, 65, 100, 513))
def test_ragged_dims(need, device, dim, dtype, double_quant):
    """Rows that start in the middle of a block, or of a byte."""
    need("embedding_4bit", dtype, double_quant=double_quant)
    weight = make_weight(21, dim, double_quant=double_quant)
    check(torch.tensor([20, 0, 7, 7, 19, 1]), weight, device, dtype)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize_and_codebook(need, device, blocksize):
    need("embedding_4bit", blocksize=blocksize)
    for codebook in CODEBOOKS:
        weight = make_weight(37, 130, blocksize=blocksize, codebook=codebook)
        check(torch.arange(36, -1, -1), weight, device)


@pytest.mark.parametrize("shape", ((), (0,), (1,), (2, 3), (2, 0, 3), (1, 2, 3, 2)), ids=str)
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
def test_ids_of_any_shape(need, device, shape, dtype):
    need("embedding_4bit")
    check(torch.randint(0, 11, shape).to(dtype), make_weight(11, 96), device)


def test_ids_not_contiguous(need, device):
    need("embedding_4bit")
    weight = make_weight(50, 33)
    ids = torch.arange(48).view(6, 8)
    for view in (lambda t: t.T, lambda t: t[::2, 1::3], lambda t: t[0, :1].expand(5)):
        out = fourbit.embedding_4bit(view(ids.to(device)), weight.packed.to(device), weight.state(device))
        assert_same_bits(out, weight.dense()[view(ids)], "rows for ids with strides")


def test_large(need, device):
    """A vocabulary of 2^24 elements and more, with many ids."""
    need("embedding_4bit", torch.bfloat16)
    weight = make_weight(70001, 240)
    check(torch.cat([torch.tensor([70000, 0]), torch.randint(0, 70001, (3000,))]), weight, device, torch.bfloat16)


def test_non_finite_rows(need, device):
    need("embedding_4bit")
    values = torch.randn(8, 64)
    values[3, 9] = torch.nan
    check(torch.arange(8), make_weight(8, 64, values=values), device)


@pytest.mark.parametrize("bad", (-1, -9, 9, 2**31 - 1, -(2**31)))
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
def test_ids_out_of_range(need, device, backend, bad, dtype):
    """IndexError on a CPU. Elsewhere a device's assertion may end the process, so another one tries it."""
    need("embedding_4bit")
    if device.type == "cpu":
        weight = make_weight(9, 64)
        packed, state = weight.packed, weight.state("cpu")
        with pytest.raises(IndexError):
            fourbit.embedding_4bit(torch.tensor([0, bad, 3], dtype=dtype), packed, state)
        check(torch.tensor([0, 8]), weight, device)
        return
    program = f"""
import torch, fourbit
with fourbit.use_backend({backend.name!r}):
    packed, state = fourbit.quantize_4bit(torch.randn(9, 64, device={str(device)!r}))
    print("before", flush=True)
    print(fourbit.embedding_4bit(torch.tensor([0, {bad}, 3], dtype={dtype}, device={str(device)!r}), packed, state))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert "before" in done.stdout, done.stderr
    assert done.returncode != 0, f"id {bad} of 9 rows gave {done.stdout}"
