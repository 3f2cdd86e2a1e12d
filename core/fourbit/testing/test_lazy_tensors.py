"""Tensors whose elements torch has not computed yet: negated and conjugated views, and zeros without memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fourbit.backend import OPS
from fourbit.testing.inputs import normal
from fourbit.testing.oracle import assert_same_bits
from fourbit.testing.test_fake import OPS_AND_NESTING, arguments, query

COVERS = OPS


def _conjugated(t: Tensor) -> Tensor:
    """t as the imaginary part of a conjugated tensor."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag


LAZY: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "negated": lambda t: (torch._neg_view(-t), t),
    "conjugated": lambda t: (_conjugated(t), t),
    "zeros": lambda t: (torch._efficientzerotensor(t.shape, dtype=t.dtype, device=t.device), torch.zeros_like(t)),
}
"""Kind to a function from a tensor to a lazy one and the plain one that it stands for."""


def with_bias(op: str, args: tuple) -> tuple:
    """The arguments of a linear op with a bias, of the others as they are."""
    if op != "linear_4bit":
        return args
    nested = args[6:] or (None, None, None)
    return (*args[:6], *nested, normal(args[5]).to(args[0].device))


@pytest.mark.parametrize("kind", LAZY)
@pytest.mark.parametrize(("op", "double_quant"), OPS_AND_NESTING)
def test_each_argument(need, device, op, double_quant, kind):
    """The same bits as with the plain tensor, whichever argument it is."""
    need(op, **query(op), double_quant=double_quant)
    args = with_bias(op, arguments(op, device, double_quant))
    run = getattr(torch.ops.fourbit, op)
    tried = 0
    for position, tensor in enumerate(args):
        if not isinstance(tensor, Tensor) or (kind == "conjugated" and not tensor.is_floating_point()):
            continue
        if kind == "zeros" and op.startswith("quantize") and position == 1:
            continue  # the codebook: nothing can be quantized to zeros alone
        lazy, plain = LAZY[kind](tensor)
        assert lazy.is_neg() or lazy._is_zerotensor()
        results = (tree_leaves(run(*args[:position], each, *args[position + 1 :])) for each in (lazy, plain))
        for actual, expected in zip(*results, strict=True):
            assert_same_bits(actual, expected.cpu(), f"{kind} argument {position}")
        tried += 1
    assert tried >= 1


@pytest.mark.parametrize("rows", (1, 3))
@pytest.mark.parametrize("kind", LAZY)
def test_with_a_gradient(need, device, kind, rows):
    """Of x and bias, with a gradient that comes back lazy too; one row is contiguous even as half of a complex one."""
    for op in ("linear_4bit", "linear_4bit_grad"):
        need(op)
    weight = arguments("linear_4bit", device)[1:6]
    results = []
    for which in (0, 1):
        leaves = [LAZY[kind](normal(*shape).to(device))[which] for shape in ((rows, 70), (11,))]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        upstream = LAZY[kind](normal(rows, 11, seed=4).to(device))[which]
        out = torch.ops.fourbit.linear_4bit(leaves[0], *weight, None, None, None, leaves[1])
        results.append((out, *torch.autograd.grad(out, leaves, upstream)))
    for actual, expected in zip(*results, strict=True):
        assert_same_bits(actual, expected.detach().cpu(), kind)
