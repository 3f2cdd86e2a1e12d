"""Gradients to x and to the bias, first and second, against autograd of the dequantized weight."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import fourbit
from fourbit.testing.inputs import DTYPES, normal
from fourbit.testing.oracle import Sample, assert_product, make_weight

COVERS = ("linear_4bit", "linear_4bit_grad")


def operands(device: torch.device, dtype: torch.dtype, rows: tuple[int, ...], double_quant: bool = False):
    """A weight [40, 96], and x and bias that require gradients."""
    weight = make_weight(40, 96, double_quant=double_quant)
    x = normal(*rows, 96).to(device, dtype).requires_grad_()
    bias = normal(40, seed=2).to(device, dtype).requires_grad_()
    return weight, x, bias


def linear(x: torch.Tensor, weight: Sample, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The public function."""
    return fourbit.linear_4bit(x, weight.packed.to(x.device), weight.state(x.device), bias)


@pytest.mark.parametrize("double_quant", (False, True), ids=("plain", "double"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ((1,), (5,), (2, 3)), ids=str)
def test_first_gradients(need, device, rows, dtype, double_quant):
    for op in COVERS:
        need(op, dtype, double_quant=double_quant)
    weight, x, bias = operands(device, dtype, rows, double_quant)
    upstream = normal(*rows, 40, seed=9).to(device, dtype)
    out = linear(x, weight, bias)
    out.backward(upstream)
    assert_product(out, x, weight.dense().T, dtype, bias)
    assert_product(x.grad, upstream, weight.dense(), dtype)
    ones = torch.ones(1, upstream.numel() // 40)
    assert_product(bias.grad[None], ones, upstream.detach().cpu().double().reshape(-1, 40), dtype)


def test_gradients_match_autograd_of_the_dense_weight(need, device):
    """Through a nonlinear function after it, to x and bias."""
    for op in COVERS:
        need(op)
    weight, x, bias = operands(device, torch.float32, (7,))
    dense = weight.dense().to(device)
    ours = torch.autograd.grad(linear(x, weight, bias).tanh().square().sum(), (x, bias))
    want = torch.autograd.grad(functional.linear(x, dense, bias).tanh().square().sum(), (x, bias))
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_second_gradients(need, device):
    """A gradient penalty: the gradient to x is differentiated again."""
    for op in COVERS:
        need(op)
    weight, x, _ = operands(device, torch.float32, (3,))
    dense = weight.dense().to(device)

    def penalty(out: torch.Tensor) -> torch.Tensor:
        (first,) = torch.autograd.grad(out.tanh().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return second

    ours, want = penalty(linear(x, weight)), penalty(functional.linear(x, dense))
    assert bool(want.any())
    torch.testing.assert_close(ours, want, rtol=1e-3, atol=1e-3)


def test_only_what_is_asked_for(need, device):
    """No gradient where none is required; bias alone, and x alone, work."""
    for op in COVERS:
        need(op)
    weight, x, bias = operands(device, torch.float32, (4,))
    assert not linear(x.detach(), weight, bias.detach()).requires_grad
    with torch.no_grad():
        assert not linear(x, weight, bias).requires_grad
    (to_bias,) = torch.autograd.grad(linear(x.detach(), weight, bias).sum(), bias)
    torch.testing.assert_close(to_bias.cpu(), torch.full((40,), 4.0))
    (to_x,) = torch.autograd.grad(linear(x, weight).sum(), x)
    assert_product(to_x, torch.ones(4, 40), weight.dense(), torch.float32)


def test_gradient_of_a_result_with_strides(need, device):
    """The incoming gradient of a transposed or summed result is not contiguous."""
    for op in COVERS:
        need(op)
    weight, x, _ = operands(device, torch.float32, (6,))
    upstream = normal(40, 6).to(device)
    (grad,) = torch.autograd.grad(linear(x, weight).T, x, upstream)
    assert_product(grad, upstream.T, weight.dense(), torch.float32)


def test_gradients_agree_with_finite_differences(need, device):
    """The map is linear in x: a step along d changes the sum by grad · d, whatever its size."""
    for op in COVERS:
        need(op)
    weight, x, _ = operands(device, torch.float32, (2,))
    direction, upstream = normal(2, 96, seed=4).to(device), normal(2, 40, seed=5).to(device)
    (grad,) = torch.autograd.grad(linear(x, weight), x, upstream)
    with torch.no_grad():
        change = ((linear(x + direction, weight) - linear(x - direction, weight)) / 2 * upstream).double().sum()
    torch.testing.assert_close((grad * direction).double().sum(), change, rtol=1e-4, atol=1e-4)
