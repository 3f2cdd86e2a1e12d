"""torch.compile, inference_mode, autocast and autograd around the device's kernels."""

from __future__ import annotations

import pytest
import torch

import fourbit
from fourbit import autograd
from fourbit.testing.oracle import assert_same_bits


def test_compiled_whole(device, layer):
    """fullgraph=True: no graph break, and the bits of the eager call."""
    x = torch.randn(4, 512, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        compiled = torch.compile(lambda x: layer(x).relu(), fullgraph=True)
        assert_same_bits(compiled(x), layer(x).relu().cpu(), "compiled")


def test_inference_mode(device, layer):
    x = torch.randn(2, 512, dtype=torch.bfloat16, device=device)
    want = layer(x).detach()
    with torch.inference_mode():
        assert_same_bits(layer(x), want.cpu(), "in inference_mode")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast(device, layer, dtype):
    x = torch.randn(3, 512, device=device)
    with torch.no_grad():
        packed, state = layer.quant_state()
        want = fourbit.linear_4bit(x.to(dtype), packed, state, layer.bias.to(dtype))
        with torch.autocast("cuda", dtype=dtype):
            y = layer(x)
    assert y.dtype == dtype
    assert_same_bits(y, want.cpu(), "under autocast")


@pytest.mark.parametrize("casting", (False, True))
def test_training_calls_go_past_torchs_dispatcher(device, layer, casting, monkeypatch):
    """In the threads of autograd's engine too; and the results are those of the other way."""

    def step():
        x = torch.ones(5, 512, dtype=torch.bfloat16, device=device, requires_grad=True)
        with torch.autocast("cuda", dtype=torch.float16, enabled=casting):
            y = layer(x)
        (grad,) = torch.autograd.grad(y.float().sum(), x)
        return y.detach(), grad

    trips = []
    module, product, op = fourbit.nn.linear, autograd._product, fourbit.nn.linear._linear_4bit
    monkeypatch.setattr(autograd, "_product", lambda *args: trips.append("backward") or product(*args))
    monkeypatch.setattr(module, "_linear_4bit", lambda *args: trips.append("forward") or op(*args))
    ours = step()
    assert trips == []
    for each in (module, autograd):
        monkeypatch.setattr(each, "undisturbed", lambda x: False)
    want = step()
    assert trips == ["forward", "backward"]
    for a, b in zip(ours, want, strict=True):
        assert_same_bits(a, b.cpu(), "past the dispatcher")


def test_gradient(device, layer):
    """Of x, against the dense weight in float64."""
    x = torch.randn(5, 512, dtype=torch.bfloat16, device=device, requires_grad=True)
    grad = torch.randn(5, 384, dtype=torch.bfloat16, device=device)
    layer(x).backward(grad)
    want = grad.double() @ layer.dequantize(torch.float32).double()
    error = (x.grad.double() - want).norm() / want.norm()
    assert float(error) < 4e-3
    with torch.no_grad():
        packed, state = layer.quant_state()
        args = (packed, state.absmax, state.code, state.blocksize)
        again = torch.ops.fourbit.linear_4bit_grad(grad, *args, 512)
    assert_same_bits(again, x.grad.cpu(), "the same gradient twice")


def test_checkpointing(device, layer):
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(2, 512, dtype=torch.bfloat16, device=device, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    first, x.grad = x.grad, None
    layer(x).sum().backward()
    assert_same_bits(first, x.grad.cpu(), "gradient through checkpointing")
