"""The same call gives the same bits, also beside other calls and on other threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fourbit
from fourbit.backend import OPS
from fourbit.testing.inputs import DTYPES, normal
from fourbit.testing.oracle import assert_same_bits, make_weight
from fourbit.testing.test_fake import arguments, query

COVERS = OPS


@pytest.mark.parametrize("op", OPS)
def test_same_call_same_bits(need, device, op):
    need(op, **query(op))
    args = arguments(op, device)
    first = [leaf.cpu().clone() for leaf in tree_leaves(getattr(torch.ops.fourbit, op)(*args))]
    for _ in range(5):
        for again, before in zip(tree_leaves(getattr(torch.ops.fourbit, op)(*args)), first, strict=True):
            assert_same_bits(again, before, f"{op}, called again")


@pytest.mark.parametrize("op", OPS)
def test_any_strides(need, device, op):
    """Backends get contiguous tensors, whatever the caller has: each argument in turn, the codebook too."""
    need(op, **query(op))
    args = arguments(op, device)
    want = [leaf.cpu().clone() for leaf in tree_leaves(getattr(torch.ops.fourbit, op)(*args))]
    for position, tensor in enumerate(args):
        if not isinstance(tensor, torch.Tensor):
            continue
        spread = torch.stack([tensor, torch.ones_like(tensor)], dim=-1)[..., 0]
        assert not spread.is_contiguous() or tensor.numel() == 1
        given = (*args[:position], spread, *args[position + 1 :])
        for actual, expected in zip(tree_leaves(getattr(torch.ops.fourbit, op)(*given)), want, strict=True):
            assert_same_bits(actual, expected, f"{op} with argument {position} not contiguous")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", (1, 16, 300))
def test_products_of_some_size(need, device, rows, dtype):
    """Large enough that work is split; a sum in no fixed order would show."""
    need("linear_4bit", dtype)
    need("linear_4bit_grad", dtype)
    weight = make_weight(520, 1030)
    x, grad = normal(rows, 1030).to(device, dtype), normal(rows, 520).to(device, dtype)
    runs = [
        (
            torch.ops.fourbit.linear_4bit(x, *weight.args(device), 520),
            torch.ops.fourbit.linear_4bit_grad(grad, *weight.args(device), 1030),
        )
        for _ in range(4)
    ]
    for run in runs[1:]:
        for again, before in zip(run, runs[0], strict=True):
            assert_same_bits(again, before.cpu(), "called again")


def test_threads(need, device):
    """Calls from several threads at once do not disturb each other."""
    for op in ("quantize_4bit", "dequantize_4bit", "linear_4bit"):
        need(op)
    weights = [normal(60, 130, seed=seed).to(device) for seed in range(4)]
    x = normal(3, 130).to(device)

    def work(w: torch.Tensor) -> list[torch.Tensor]:
        packed, state = fourbit.quantize_4bit(w, blocksize=64)
        out = fourbit.linear_4bit(x, packed, state), fourbit.dequantize_4bit(packed, state)
        return [tensor.cpu() for tensor in (packed, state.absmax, *out)]

    want = [work(w) for w in weights]
    with ThreadPoolExecutor(4) as pool:
        for index, results in enumerate(pool.map(work, weights * 8)):
            for again, before in zip(results, want[index % 4], strict=True):
                assert_same_bits(again, before, "on another thread")
