"""Fake tensors: each op says the shape, dtype, device and strides of its result without running."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from fourbit.backend import OPS
from fourbit.codebooks import NF4, dynamic_map
from fourbit.operations import OPERATIONS
from fourbit.testing.inputs import normal
from fourbit.testing.oracle import make_weight

COVERS = OPS


def arguments(op: str, device: torch.device, double_quant: bool = False) -> tuple:
    """A valid call of each op, with odd sizes and dimensions."""
    matrix, experts = (make_weight(*shape, double_quant=double_quant) for shape in ((11, 70), (3, 5, 64)))
    nested = matrix.nested_args(device)
    args = matrix.args(device)
    offsets = torch.tensor([1, 4, 4], device=device)
    codes = torch.arange(70, dtype=torch.uint8, device=device).view(7, 10)
    calls = {
        "quantize_4bit": (normal(7, 11).to(device), NF4.tensor(device), 64, False),
        "quantize_4bit_scaled": (normal(7, 11).to(device), NF4.tensor(device), 64, torch.ones(2, device=device)),
        "dequantize_4bit": (*args, [11, 70], torch.bfloat16, *nested),
        "linear_4bit": (normal(2, 3, 70).to(device), *args, 11, *nested),
        "linear_4bit_grad": (normal(2, 3, 11).to(device), *args, 70, *nested),
        "embedding_4bit": (codes[:2].long() % 11, *args, 11, 70, torch.bfloat16, *nested),
        "grouped_linear_4bit": (
            *(normal(6, 64).to(device), offsets, *experts.args(device), 5),
            *experts.nested_args(device),
        ),
        "grouped_linear_4bit_grad": (
            *(normal(6, 5).to(device), offsets, *experts.args(device), 64),
            *experts.nested_args(device),
        ),
        "quantize_blockwise": (normal(7, 11).to(device), dynamic_map(device), 256),
        "dequantize_blockwise": (codes, torch.ones(1, device=device), dynamic_map(device), 256, torch.bfloat16),
    }
    return calls[op]


def query(op: str) -> dict:
    """What to ask `need` for the call above."""
    chosen = ("dequantize_4bit", "embedding_4bit", "dequantize_blockwise")  # whose dtype is not an input's
    dtype = torch.bfloat16 if op in chosen else torch.float32
    return {"dtype": dtype, "blocksize": 256 if op.endswith("blockwise") else 64}


NOT_NESTED = tuple(op for op in OPS if "Weight" not in OPERATIONS[op].arguments)
OPS_AND_NESTING = [(op, double) for op in OPS for double in (False, True) if not (double and op in NOT_NESTED)]


@pytest.mark.parametrize(("op", "double_quant"), OPS_AND_NESTING)
def test_fake_result_is_like_the_real_one(need, device, op, double_quant):
    need(op, **query(op), double_quant=double_quant)
    args = arguments(op, device, double_quant)
    run = getattr(torch.ops.fourbit, op)
    real = tree_leaves(run(*args))
    with FakeTensorMode() as mode:
        fake = tree_leaves(run(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args)))
    assert len(fake) == len(real)
    for left, right in zip(fake, real, strict=True):
        assert isinstance(left, FakeTensor)
        assert (left.shape, left.dtype, left.device) == (right.shape, right.dtype, right.device)
        assert left.stride() == right.stride()


@pytest.mark.parametrize(("op", "double_quant"), OPS_AND_NESTING)
def test_opcheck(need, device, op, double_quant):
    """torch's own check: the schema is true (no hidden writes or aliases), fakes and dynamic shapes work."""
    need(op, **query(op), double_quant=double_quant)
    if op.startswith("linear_4bit"):
        need("linear_4bit")
        need("linear_4bit_grad")
    args = arguments(op, device, double_quant)
    torch.library.opcheck(
        getattr(torch.ops.fourbit, op).default,
        args,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("op", OPS)
def test_meta_tensors(need, device, op):
    """The meta device gives shapes too, as `torch.device("meta")` models ask for."""
    need(op, **query(op))
    args = arguments(op, device)
    real = tree_leaves(getattr(torch.ops.fourbit, op)(*args))
    moved = (a.to("meta") if isinstance(a, torch.Tensor) else a for a in args)
    for left, right in zip(tree_leaves(getattr(torch.ops.fourbit, op)(*moved)), real, strict=True):
        assert left.is_meta and (left.shape, left.dtype) == (right.shape, right.dtype)
