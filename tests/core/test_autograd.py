"""Gradients: right, of any order, under autocast, and without keeping a 16-bit weight."""

from __future__ import annotations

import pytest
import torch

import fourbit
from fourbit.testing.oracle import assert_product

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=[False, True], ids=["plain", "nested"])
def weight(request):
    packed, state = fourbit.quantize_4bit(randn(48, 64), blocksize=32, double_quant=request.param)
    return packed, state, fourbit.dequantize_4bit(packed, state)


@pytest.mark.parametrize("shape", [(64,), (5, 64), (0, 64), (2, 3, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_the_dequantized_weight(weight, shape, dtype):
    packed, state, w = weight
    x = randn(*shape, seed=1, dtype=dtype).requires_grad_()
    bias = randn(48, seed=2, dtype=dtype).requires_grad_()
    up = randn(*shape[:-1], 48, seed=3, dtype=dtype)
    of_x, of_bias = torch.autograd.grad(fourbit.linear_4bit(x, packed, state, bias), (x, bias), up)
    assert_product(of_x, up, w, dtype)
    (want,) = torch.autograd.grad(torch.nn.functional.linear(x, w.to(dtype), bias), bias, up)
    assert of_bias.dtype == dtype
    torch.testing.assert_close(of_bias, want)


def test_only_what_is_asked_for(weight):
    packed, state, w = weight
    bias = torch.zeros(48, requires_grad=True)
    y = fourbit.linear_4bit(randn(3, 64), packed, state, bias)
    y.sum().backward()
    assert bias.grad.tolist() == [3.0] * 48
    x = randn(3, 64).requires_grad_()
    fourbit.linear_4bit(x, packed, state, bias.detach()).sum().backward()
    torch.testing.assert_close(x.grad, w.sum(0).expand(3, 64))


def test_nothing_is_recorded_without_need(weight):
    packed, state, _ = weight
    assert fourbit.linear_4bit(randn(2, 64), packed, state).grad_fn is None
    with torch.no_grad():
        assert fourbit.linear_4bit(randn(2, 64).requires_grad_(), packed, state).grad_fn is None
    assert fourbit.quantize_4bit(randn(4, 32).requires_grad_())[0].grad_fn is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_keeps_the_packed_weight_alone(weight, dtype):
    """What a 16-bit library keeps for backward, [48, 64] values of the weight, must not be there."""
    packed, state, _ = weight
    saved: list[torch.Tensor] = []

    def remember(tensor):
        saved.append(tensor)
        return tensor

    x = randn(5, 64, dtype=dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
        y = fourbit.linear_4bit(x, packed, state, randn(48, dtype=dtype).requires_grad_())
    parts = (packed, state.absmax, state.code, state.nested_absmax, state.nested_code, state.nested_offset)
    assert saved and {t.data_ptr() for t in saved} <= {t.data_ptr() for t in parts if t is not None}
    assert sum(t.nbytes for t in saved) < 48 * 64 * 2
    y.sum().backward()


def test_memory_of_a_deep_stack_does_not_grow_with_unpacked_weights():
    packed, state = fourbit.quantize_4bit(randn(64, 64), blocksize=32)
    saved = 0

    def count(tensor):
        nonlocal saved
        saved += tensor.nbytes
        return tensor

    y = randn(1, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        for _ in range(10):
            y = fourbit.linear_4bit(y, packed, state)
    assert saved <= 10 * (packed.nbytes + state.absmax.nbytes + 64)


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # float64 is none of the op's dtypes
def test_gradcheck_and_gradgradcheck():
    """In float32, so with wide steps; the op is linear, so finite differences are exact but for rounding."""
    packed, state = fourbit.quantize_4bit(randn(4, 32), blocksize=32)
    x, bias = randn(2, 32, seed=1).requires_grad_(), randn(4, seed=2).requires_grad_()

    def run(x, bias):
        return fourbit.linear_4bit(x, packed, state, bias)

    options = {"eps": 0.5, "atol": 1e-3, "rtol": 1e-3}
    assert torch.autograd.gradcheck(run, (x, bias), check_undefined_grad=True, **options)
    assert torch.autograd.gradgradcheck(run, (x, bias), **options)


def test_double_backward_equals_that_of_the_dequantized_weight(weight):
    packed, state, w = weight
    results = []
    for linear in (lambda x: fourbit.linear_4bit(x, packed, state), lambda x: x @ w.T):
        x = randn(3, 64, seed=1).requires_grad_()
        (grad,) = torch.autograd.grad(linear(x).sin().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x, create_graph=True)
        (third,) = torch.autograd.grad(second.sum(), x)
        results.append((grad, second, third))
    for a, b in zip(*results, strict=True):
        # float32 rounding of the products, which the sines and squares between them carry on
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.detach().abs().max()))


# ---- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
def test_autocast_is_that_of_torchs_linear(weight, dtype, x_dtype):
    packed, state, w = weight
    x = randn(3, 64, seed=1, dtype=x_dtype).requires_grad_()
    bias = randn(48, seed=2).requires_grad_()
    ours, torchs = [], []
    for results, linear in (
        (ours, lambda: fourbit.linear_4bit(x, packed, state, bias)),
        (torchs, lambda: torch.nn.functional.linear(x, w, bias)),
    ):
        with torch.autocast("cpu", dtype=dtype):
            y = linear()
        assert y.dtype == dtype
        results += [y, *torch.autograd.grad(y.float().square().sum(), (x, bias))]
    for a, b in zip(ours, torchs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.5 if a is not ours[0] else 0.02)


def test_autocast_switched_off_inside(weight):
    packed, state, _ = weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            assert fourbit.linear_4bit(randn(2, 64), packed, state).dtype == torch.float32
        assert fourbit.linear_4bit(randn(2, 64), packed, state).dtype == torch.bfloat16


def test_autocast_of_experts():
    packed, state = fourbit.quantize_4bit(randn(2, 8, 32), blocksize=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fourbit.grouped_linear_4bit(randn(4, 32), torch.tensor([2, 4]), packed, state)
    assert y.dtype == torch.bfloat16


def test_checkpointing_recomputes_the_same(weight):
    from torch.utils.checkpoint import checkpoint

    packed, state, _ = weight
    x = randn(3, 64).requires_grad_()

    def run(x):
        return fourbit.linear_4bit(x, packed, state).tanh()

    (want,) = torch.autograd.grad(run(x).sum(), x)
    (got,) = torch.autograd.grad(checkpoint(run, x, use_reentrant=False).sum(), x)
    assert torch.equal(got, want)
