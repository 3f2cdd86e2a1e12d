"""torch.compile: whole graphs, no breaks, and no recompiles where a user would expect none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch

import fourbit
from fourbit.testing.inputs import normal
from fourbit.testing.oracle import assert_product, assert_same_bits, make_weight

COVERS = ("linear_4bit", "linear_4bit_grad", "dequantize_4bit", "embedding_4bit", "quantize_4bit")

nested = pytest.mark.parametrize("double_quant", (False, True), ids=("plain", "double"))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Every test compiles from nothing and leaves nothing."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function, **options):
    """`function` in one graph, without the time that inductor takes."""
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def make_linear(device: torch.device, double_quant: bool):
    """`(function of x, dense weight)`: a linear layer of the sort that users compile."""
    weight = make_weight(24, 96, double_quant=double_quant)
    packed, state = weight.packed.to(device), weight.state(device)
    bias = normal(24).to(device)
    return (lambda x: fourbit.linear_4bit(torch.sin(x), packed, state, bias) * 2), weight.dense().T, bias


@nested
def test_same_shape_compiles_once(need, device, double_quant):
    need("linear_4bit", double_quant=double_quant)
    function, dense, bias = make_linear(device, double_quant)
    run = compiled(function)
    run(normal(4, 96).to(device))
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(5):
            x = normal(4, 96, seed=seed).to(device)
            assert_product(run(x) / 2, torch.sin(x), dense, torch.float32, bias)


@nested
def test_dynamic_batch_compiles_once(need, device, double_quant):
    """With dynamic=True one graph serves every number of rows from 2."""
    need("linear_4bit", double_quant=double_quant)
    function, dense, bias = make_linear(device, double_quant)
    run = compiled(function, dynamic=True)
    run(normal(5, 96).to(device))
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (2, 3, 8, 17, 64):
            x = normal(rows, 96).to(device)
            assert_product(run(x) / 2, torch.sin(x), dense, torch.float32, bias)


def test_marked_dimension_compiles_once(need, device):
    need("linear_4bit")
    function, dense, bias = make_linear(device, False)
    run = compiled(function)
    first = normal(5, 96).to(device)
    torch._dynamo.mark_dynamic(first, 0)
    run(first)
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (2, 9, 33):
            x = normal(rows, 96).to(device)
            assert_product(run(x) / 2, torch.sin(x), dense, torch.float32, bias)


def test_automatic_dynamic_shapes(need, device):
    """Without options the second size makes the batch dynamic, and the third compiles nothing."""
    need("linear_4bit")
    function, _, _ = make_linear(device, False)
    run = compiled(function)
    for rows in (4, 6):
        run(normal(rows, 96).to(device))
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (2, 7, 50):
            run(normal(rows, 96).to(device))


@nested
def test_state_as_an_argument(need, device, double_quant):
    """A compiled function takes packed weights and their states as arguments, one layer after another."""
    need("linear_4bit", double_quant=double_quant)
    run = compiled(lambda x, packed, state: fourbit.linear_4bit(x, packed, state))
    x = normal(3, 96).to(device)
    first, second = (make_weight(24, 96, double_quant=double_quant, seed=seed) for seed in (1, 2))
    run(x, first.packed.to(device), first.state(device))
    with torch.compiler.set_stance("fail_on_recompile"):
        out = run(x, second.packed.to(device), second.state(device))
    assert_product(out, x, second.dense().T, torch.float32)


@nested
def test_training_step(need, device, double_quant):
    """Forward and backward in compiled form, for several batch sizes with one compilation."""
    for op in ("linear_4bit", "linear_4bit_grad"):
        need(op, double_quant=double_quant)
    function, dense, bias = make_linear(device, double_quant)
    run = compiled(function, dynamic=True)

    def step(rows: int) -> None:
        x = normal(rows, 96).to(device).requires_grad_()
        (grad,) = torch.autograd.grad(run(x).square().sum(), x)
        y = x.detach().cpu().double().requires_grad_()
        want = ((torch.sin(y) @ dense.double() + bias.cpu().double()) * 2).square().sum()
        torch.testing.assert_close(grad.cpu().double(), torch.autograd.grad(want, y)[0], rtol=1e-3, atol=1e-3)

    step(4)
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (2, 5, 31):
            step(rows)


@nested
def test_dequantize_and_embedding(need, device, double_quant):
    for op in ("dequantize_4bit", "embedding_4bit"):
        need(op, double_quant=double_quant)
    weight = make_weight(30, 70, double_quant=double_quant)
    packed, state = weight.packed.to(device), weight.state(device)
    run = compiled(lambda ids: fourbit.embedding_4bit(ids, packed, state), dynamic=True)
    run(torch.arange(4, device=device))
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in (3, 11):
            ids = torch.arange(count, device=device)
            assert_same_bits(run(ids), weight.dense()[:count], "compiled embedding")
    assert_same_bits(compiled(lambda: fourbit.dequantize_4bit(packed, state))(), weight.dense(), "compiled dequantize")


@nested
def test_quantize(need, device, double_quant):
    """Weights can be quantized inside a compiled function too."""
    need("quantize_4bit")
    need("quantize_blockwise")
    w = normal(20, 50)

    def quantize(w: torch.Tensor):
        packed, state = fourbit.quantize_4bit(w, blocksize=64, double_quant=double_quant)
        return packed, state.absmax

    packed, absmax = compiled(quantize)(w.to(device))
    weight = make_weight(20, 50, double_quant=double_quant, values=w)
    assert_same_bits(packed, weight.packed, "packed")
    assert_same_bits(absmax, weight.absmax, "absmax")


@pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")),
    reason="inductor needs a C++ compiler, and there is none on the PATH",
)
def test_inductor(need, device):
    """torch.compile's own default, once."""
    need("linear_4bit")
    function, dense, bias = make_linear(device, False)
    run = torch.compile(function, fullgraph=True, dynamic=True)
    run(normal(5, 96).to(device))
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (3, 20):
            x = normal(rows, 96).to(device)
            assert_product(run(x) / 2, torch.sin(x), dense, torch.float32, bias)
