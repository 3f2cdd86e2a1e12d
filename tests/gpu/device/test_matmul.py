"""The kernel for many rows of x on the GPU itself: every kind of block, and what plans choose for real sizes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fourbit
from tests.pair_weights import pair_weights

matmul = pytest.importorskip("fourbit_cuda.matmul")
DTYPES = {torch.bfloat16: 1, torch.float16: 2}


@pytest.fixture(scope="module")
def launcher(device):
    from fourbit_cuda.driver import launcher

    found = launcher(0)
    if found.props.arch != matmul.ARCH:
        pytest.skip(f"sm_{found.props.arch} has no such kernel")
    return found


def quantized(shape, dtype, device, **options):
    """Packed, state, and the weight that they stand for."""
    torch.manual_seed(0)
    w = torch.randn(shape, device=device, dtype=dtype)
    packed, state = fourbit.quantize_4bit(w, **options)
    return packed, state, fourbit.dequantize_4bit(packed, state, dtype).view(shape)


def check(y, x, dense):
    """`dense` [in, out]. Sums of float32 as tensor cores make them, rounded once."""
    expected = x.double() @ dense.double()
    rounding = torch.finfo(y.dtype).eps / 2
    assert ((y.double() - expected).abs() <= 1.01 * rounding * expected.abs() + 1e-4 * expected.abs().max()).all()


def check_close(y, x, dense, bias=0.0):
    """Kernels for up to 192 rows round codes, and that for few no weights: near to `dense`, but not equal to it."""
    expected = x.double() @ dense.double() + bias
    assert (y.double() - expected).norm() <= 4e-3 * expected.norm()
    assert ((y.double() - expected).abs() <= 0.02 * expected.abs().max()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kind",
    matmul.BLOCKS,
    ids=lambda b: f"{b.columns}-{b.split}-{'gradient' if b.transposed else 'product'}{'-bytes' * b.bytewise}",
)
def test_every_kind_of_block(launcher, device, kind, dtype):
    from fourbit_cuda.tile import Shape

    for (n, k), blocksize, nested in (((4304, 1152), 64, False), ((520, 4096), 4096, True), ((136, 192), 32, True)):
        packed, state, dense = quantized((n, k), dtype, device, blocksize=blocksize, double_quant=nested)
        if kind.bytewise and dtype is torch.bfloat16:
            dense = pair_weights(packed, state).view(n, k)
        inner, outputs = (n, k) if kind.transposed else (k, n)
        nested_at = (
            [t.data_ptr() for t in (state.nested_absmax, state.nested_code, state.nested_offset)] if nested else []
        )
        for rows in (1, 65, 513):
            x = torch.randn(rows, inner, device=device, dtype=dtype)
            y = torch.full((rows, outputs), float("nan"), device=device, dtype=dtype)
            shape = Shape(rows, n, k, DTYPES[dtype], blocksize, nested, transposed=kind.transposed)
            plan = matmul.make_plan(launcher.props, shape, kind)
            ready = matmul.Ready(launcher.kernel(plan.spec, plan.shared_bytes), plan, shape)
            scales = (state.absmax.data_ptr(), state.code.data_ptr(), *(nested_at or (0, 0, 0)))
            ready(x.data_ptr(), packed.data_ptr(), *scales, 0, y.data_ptr())
            check(y, x, dense if kind.transposed else dense.T)


@pytest.mark.parametrize("rows", (33, 129, 512, 2100))
@pytest.mark.parametrize("n, k", ((4096, 14336), (14336, 4096), (1024, 4096)))
def test_sizes_of_prefill_and_training(device, n, k, rows):
    dtype = torch.bfloat16
    packed, state, dense = quantized((n, k), dtype, device, double_quant=rows % 2 == 0)
    bias = torch.randn(n, device=device, dtype=dtype)
    x = torch.randn(rows, k, device=device, dtype=dtype, requires_grad=True)
    y = fourbit.linear_4bit(x, packed, state, bias)
    check_close(y.detach(), x.detach(), dense.T, bias.double())
    grad = torch.randn_like(y)
    y.backward(grad)
    check_close(x.grad, grad, dense)


def test_a_thread_of_its_own(launcher, device):
    """The copy engine's maps want a context, which a thread that never used the device does not have."""
    packed, state, dense = quantized((4096, 4096), torch.bfloat16, device)
    x = torch.randn(200, 4096, device=device, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        y = pool.submit(fourbit.linear_4bit, x, packed, state).result()
    check_close(y, x, dense.T)


@pytest.mark.parametrize("wide", (False, True), ids=("int32", "int64"))
@pytest.mark.parametrize("rows", (1, 5, 60, 700, 5000))
def test_experts(device, rows, wide):
    """Few of them busy, and all of them; rows past the last one's."""
    experts, n, k, dtype = 70, 1408, 2048, torch.bfloat16
    packed, state, dense = quantized((experts, n, k), dtype, device)
    chosen = torch.randint(3, experts, (rows,), device=device)
    ends = torch.bincount(chosen, minlength=experts).cumsum(0).to(torch.int64 if wide else torch.int32)
    x = torch.randn(rows + 3, k, device=device, dtype=dtype, requires_grad=True)
    y = fourbit.grouped_linear_4bit(x, ends, packed, state)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert not y[rows:].any() and not x.grad[rows:].any()
    first = 0
    for expert, end in enumerate(ends.tolist()):
        if end > first:
            check_close(y[first:end].detach(), x[first:end].detach(), dense[expert].T)
            check_close(x.grad[first:end], grad[first:end], dense[expert])
        first = end
