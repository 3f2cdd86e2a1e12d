"""The public functions: results, shapes, and what they say to arguments that do not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fourbit
from fourbit import registry
from fourbit.operations import OPERATIONS
from fourbit.testing.oracle import assert_product

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=[False, True], ids=["plain", "nested"])
def weight(request):
    """packed, state and dequantized float32 values of a [48, 64] weight."""
    packed, state = fourbit.quantize_4bit(randn(48, 64), blocksize=32, double_quant=request.param)
    return packed, state, fourbit.dequantize_4bit(packed, state)


# ---- linear --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64,), (1, 64), (5, 64), (0, 64), (2, 0, 64), (2, 3, 4, 64)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_is_the_product_with_the_dequantized_weight(weight, shape, with_bias, dtype):
    packed, state, w = weight
    x, bias = randn(*shape, seed=1, dtype=dtype), randn(48, seed=2, dtype=dtype) if with_bias else None
    y = fourbit.linear_4bit(x, packed, state, bias)
    assert_product(y, x, w.T, dtype, bias)


def test_non_contiguous_arguments(weight):
    packed, state, w = weight
    x = randn(64, 10, seed=3).T
    strided = torch.stack([packed, packed + 1], dim=-1)[..., 0]
    scales = torch.stack([state.absmax, state.absmax], dim=-1)[..., 0]
    assert not x.is_contiguous() and not strided.is_contiguous() and not scales.is_contiguous()
    torch.testing.assert_close(fourbit.linear_4bit(x, strided, replace(state, absmax=scales)), x @ w.T)
    assert torch.equal(fourbit.dequantize_4bit(strided, state), w)
    if state.double_quant:
        table = torch.stack([state.nested_code, state.nested_code], dim=-1)[..., 0]
        torch.testing.assert_close(fourbit.linear_4bit(x, strided, replace(state, nested_code=table)), x @ w.T)
    assert torch.equal(fourbit.embedding_4bit(torch.arange(48)[::5], strided, state), w[::5])
    view = randn(64, 48).T
    again, _ = fourbit.quantize_4bit(view, blocksize=32)
    assert torch.equal(again, fourbit.quantize_4bit(view.contiguous(), blocksize=32)[0])


def test_any_shape_of_packed_and_scales(weight):
    """Modules keep packed as [out, in/2] and checkpoints as [n/2, 1]: the bytes are the same."""
    packed, state, w = weight
    shaped = replace(state, absmax=state.absmax.view(48, 2))
    assert torch.equal(fourbit.dequantize_4bit(packed.view(48, 32), shaped), w)
    torch.testing.assert_close(fourbit.linear_4bit(w, packed.view(-1), shaped), w @ w.T)


def test_a_large_weight_is_worked_on_in_chunks(monkeypatch):
    monkeypatch.setattr("fourbit.numerics.CHUNK", 1024)
    packed, state = fourbit.quantize_4bit(randn(50, 63), blocksize=64)  # blocks run across rows
    w = fourbit.dequantize_4bit(packed, state)
    x = randn(3, 63, seed=4).requires_grad_()
    y = fourbit.linear_4bit(x, packed, state)
    torch.testing.assert_close(y, x @ w.T)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, w.sum(0).expand(3, 63))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference_mode(weight, dtype):
    packed, state, w = weight
    with torch.inference_mode():
        x = randn(2, 64, dtype=dtype)
        y = fourbit.linear_4bit(x, packed, state)
        assert y.is_inference()
        assert_product(y, x, w.T, dtype)
        inside, inside_state = fourbit.quantize_4bit(randn(8, 32))
    # the code table is shared: made under inference mode, it must still serve outside
    fourbit.linear_4bit(randn(2, 32).requires_grad_(), inside.clone(), fourbit.quantize_4bit(randn(8, 32))[1])
    assert inside.is_inference() and not inside_state.code.is_inference()


# ---- embedding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (7,), (0,), (2, 3)], ids=str)
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
def test_embedding_gives_rows(weight, shape, ids_dtype):
    packed, state, w = weight
    ids = torch.randint(0, 48, shape, dtype=ids_dtype)
    assert torch.equal(fourbit.embedding_4bit(ids, packed, state), w[ids.long()])
    half = fourbit.embedding_4bit(ids, packed, state, torch.bfloat16)
    assert torch.equal(half, w.bfloat16()[ids.long()])


def test_embedding_refuses_an_id_out_of_range(weight):
    for bad in (-1, 48, 2**40):
        with pytest.raises(IndexError, match=f"id {bad} .*out of range for 48 rows"):
            fourbit.embedding_4bit(torch.tensor([0, bad]), *weight[:2])


def test_embedding_of_odd_rows():
    packed, state = fourbit.quantize_4bit(randn(9, 33), blocksize=32)
    w = fourbit.dequantize_4bit(packed, state)
    assert torch.equal(fourbit.embedding_4bit(torch.arange(9), packed, state), w)


# ---- experts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 8, 64), (3, 5, 33)], ids=str)  # the second: blocks straddle experts
@pytest.mark.parametrize("nested", [False, True])
def test_grouped_linear(shape, nested):
    experts, out, width = shape
    packed, state = fourbit.quantize_4bit(randn(*shape), blocksize=32, double_quant=nested)
    w = fourbit.dequantize_4bit(packed, state)
    x = randn(12, width, seed=1).requires_grad_()
    ends = torch.tensor([0, 5, 9, 11][-experts:] if experts == 3 else [3, 3, 7, 10])
    y = fourbit.grouped_linear_4bit(x, ends, packed, state)
    want = torch.zeros(12, out)
    start = 0
    for e, end in enumerate(ends.tolist()):
        want[start:end] = x[start:end] @ w[e].T
        start = end
    torch.testing.assert_close(y, want)
    assert not y[start:].any()
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    (want_grad,) = torch.autograd.grad(want.square().sum(), x)
    # the products of two libraries differ by float32 rounding, and their squares' gradient by as much of its size
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-6 * float(want_grad.abs().max()))


# ---- arguments that do not fit -------------------------------------------------------------------

PACKED, STATE = fourbit.quantize_4bit(randn(48, 64), blocksize=32)
X = torch.zeros(2, 64)


@pytest.mark.parametrize(
    ("w", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, "w must be a tensor, got list"),
        (torch.tensor(1.0), {}, ValueError, "w has no dimensions"),
        (torch.zeros(0, 4), {}, ValueError, r"w is empty, shape \[0, 4\]"),
        (torch.zeros(4, dtype=torch.int64), {}, TypeError, "w must be float32.*int64"),
        (torch.zeros(4, dtype=torch.float64), {}, TypeError, "float64"),
        (torch.zeros(4, dtype=torch.complex64), {}, TypeError, "complex64"),
        (torch.zeros(4), {"blocksize": 63}, ValueError, "power of two.*63"),
        (torch.zeros(4), {"blocksize": 16}, ValueError, "from 32 to 4096"),
        (torch.zeros(4), {"blocksize": 8192}, ValueError, "from 32 to 4096"),
        (torch.zeros(4), {"blocksize": 0}, ValueError, "got 0"),
        (torch.zeros(4), {"blocksize": "64"}, TypeError, "blocksize must be an int, got str"),
        (torch.zeros(4), {"blocksize": 64.0}, TypeError, "blocksize must be an int, got float"),
        (torch.zeros(4), {"blocksize": True}, TypeError, "blocksize must be an int, got bool"),
        (torch.zeros(4), {"quant_type": "int4"}, ValueError, "unknown quant_type 'int4'"),
        (torch.zeros(4), {"quant_type": None}, TypeError, "quant_type must be a string"),
    ],
)
def test_quantize_says_what_is_wrong(w, options, error, message):
    with pytest.raises(error, match=f"{message}" if "quant_type" in message else f"quantize_4bit: .*{message}"):
        fourbit.quantize_4bit(w, **options)


@pytest.mark.parametrize(
    ("x", "packed", "changes", "bias", "error", "message"),
    [
        (torch.zeros(2, 63), PACKED, {}, None, ValueError, r"x has shape \[2, 63\]"),
        (torch.zeros(()), PACKED, {}, None, ValueError, "x has shape"),
        (X.long(), PACKED, {}, None, TypeError, "x must be float32.*int64"),
        (X.double(), PACKED, {}, None, TypeError, "x must be float32.*float64"),
        (X, PACKED[:-1], {}, None, ValueError, "packed must be uint8 with 1536 bytes"),
        (X, PACKED.to(torch.int8), {}, None, ValueError, "packed must be uint8"),
        (X, PACKED, {}, torch.zeros(47), ValueError, r"bias must have shape \[48\]"),
        (X, PACKED, {}, torch.zeros(1, 48), ValueError, "bias must have shape"),
        (X, PACKED, {}, torch.zeros(48).half(), TypeError, "bias is torch.float16 and x is torch.float32"),
        (X, PACKED.to("meta"), {}, None, ValueError, "packed is on meta"),
        (X.view(2, 4, 16), PACKED, {"shape": (12, 16, 16)}, None, ValueError, "weight must be 2-D"),
    ],
)
def test_linear_says_what_is_wrong(x, packed, changes, bias, error, message):
    with pytest.raises(error, match=f"linear_4bit: .*{message}"):
        fourbit.linear_4bit(x, packed, replace(STATE, **changes), bias)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fourbit.dequantize_4bit(PACKED, None), TypeError, "state must be a fourbit.QuantState, got NoneType"),
        (lambda: fourbit.dequantize_4bit(None, STATE), TypeError, "packed must be a tensor"),
        (lambda: fourbit.dequantize_4bit(PACKED[1:], STATE), ValueError, "packed must be uint8 with 1536 bytes"),
        (lambda: fourbit.dequantize_4bit(PACKED.float(), STATE), ValueError, "packed must be uint8"),
        (lambda: fourbit.dequantize_4bit(PACKED, STATE, torch.float64), TypeError, "dtype must be float32.*float64"),
        (lambda: fourbit.embedding_4bit(X, PACKED, STATE), TypeError, "ids must be int32 or int64"),
        (lambda: fourbit.embedding_4bit([1], PACKED, STATE), TypeError, "ids must be a tensor"),
        (lambda: fourbit.grouped_linear_4bit(X, torch.tensor([1]), PACKED, STATE), ValueError, "do not fit"),
        (lambda: fourbit.quantize_blockwise(torch.zeros(4, dtype=torch.uint8)), TypeError, "x must be float32"),
        (lambda: fourbit.quantize_blockwise(X, code=torch.zeros(16)), ValueError, r"code must be float32 \[256\]"),
        (lambda: fourbit.quantize_blockwise(X, blocksize=100), ValueError, "power of two"),
        (lambda: fourbit.dequantize_blockwise(X, torch.zeros(1)), TypeError, "codes must be uint8"),
        (lambda: fourbit.dequantize_blockwise(X.byte(), torch.zeros(2)), ValueError, "absmax must be float32 with 1"),
    ],
)
def test_the_others_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_offsets_of_experts_are_checked():
    packed, state = fourbit.quantize_4bit(randn(2, 4, 32), blocksize=32)
    for offsets in ([3, 2], [-1, 4], [2, 6], [2**63 - 1, -(2**63)]):  # the last one's difference wraps to 1
        with pytest.raises(ValueError, match="offsets must rise from 0 to at most 5 rows"):
            fourbit.grouped_linear_4bit(torch.zeros(5, 32), torch.tensor(offsets), packed, state)
    with pytest.raises(TypeError, match="offsets must be int32 or int64"):
        fourbit.grouped_linear_4bit(torch.zeros(5, 32), torch.tensor([1.0, 2.0]), packed, state)


def test_the_first_non_finite_element_is_named():
    w = torch.zeros(3, 4, 5)
    fourbit.functional.require_finite(w, "model.weight")
    w[1, 2, 3], w[2, 0, 0] = torch.inf, torch.nan
    with pytest.raises(fourbit.NonFiniteError, match=r"model.weight has .*\(inf\) at index \[1, 2, 3\]"):
        fourbit.functional.require_finite(w, "model.weight")


def test_ops_are_known_to_torch_and_to_the_registry():
    for name in OPERATIONS:
        op = getattr(torch.ops.fourbit, name).default
        assert torch.Tag.pt2_compliant_tag in op.tags
    assert set(OPERATIONS) - {"double_quantize"} == set(registry.state.tables)
