"""torch.func over modules, what the shortcut past torch's dispatcher takes, and what vmap refuses."""

from __future__ import annotations

import pytest
import torch
from torch import func, nn

import fourbit
from fourbit import autograd
from tests.core.modes import Ops


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def modules(**options):
    """A Linear4bit [8, 64] and an nn.Linear of the same weight and bias."""
    plain = nn.Linear(64, 8)
    packed = fourbit.nn.Linear4bit.from_linear(plain, fourbit.QuantConfig(blocksize=32, **options))
    with torch.no_grad():
        plain.weight.copy_(packed.dequantize())
    return packed, plain


# ---- modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
def test_functional_call_is_that_of_the_dense_module(double_quant):
    x, bias = randn(5, 64), randn(8, seed=1)
    results = []
    for module in modules(double_quant=double_quant):

        def loss(bias, x, module=module):
            return func.functional_call(module, {"bias": bias}, (x,)).square().sum()

        results.append(
            (
                func.functional_call(module, {"bias": bias}, (x,)),
                *func.grad(loss, argnums=(0, 1))(bias, x),
                func.vmap(func.grad(loss), in_dims=(None, 0))(bias, x),
                *func.jvp(loss, (bias, x), (bias, x)),
                func.hessian(loss)(bias, x),
            )
        )
    for ours, want in zip(*results, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4 * float(want.detach().abs().max()))


def test_functional_call_with_every_tensor_of_the_module():
    module, plain = modules()
    module.eval()
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    x = randn(5, 64)
    run = func.vmap(lambda x: func.functional_call(module, tensors, (x,)))
    torch.testing.assert_close(run(x), plain(x))


def _vmap_views_other_dtypes() -> bool:
    try:
        func.vmap(lambda bits: bits.view(torch.float32))(torch.zeros(2, 3, dtype=torch.int32))
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(not _vmap_views_other_dtypes(), reason="this torch cannot vmap view(dtype)")
def test_an_ensemble_of_modules():
    """vmap over stacked weights: one call for each, the kernels take one weight at a time."""
    members = [modules()[0] for _ in range(3)]
    parameters, buffers = func.stack_module_state([member.requires_grad_(False) for member in members])
    x = randn(5, 64)
    run = func.vmap(lambda p, b: func.functional_call(members[0], (p, b), (x,)))
    for got, member in zip(run(parameters, buffers), members, strict=True):
        assert torch.equal(got, member(x))


def test_autocast_holds_inside_vmap():
    module, _ = modules()
    x = randn(3, 5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, want = func.vmap(module)(x), module(x)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, want, rtol=0.02, atol=0.02)


COMPILED = {
    "grad": lambda f, x: func.grad(lambda x: f(x).sin().sum())(x),
    "vmap of grad": lambda f, x: func.vmap(func.grad(lambda x: f(x).sin().sum()))(x),
    "jvp": lambda f, x: func.jvp(f, (x,), (x.sin(),))[1],
    "jacfwd": lambda f, x: func.jacfwd(f)(x[0]),
    "hessian": lambda f, x: func.hessian(lambda x: f(x).sin().sum())(x[0]),
}
"""Name to a transform of f at x [2, 64]."""


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name, backend):
    module, plain = (each.requires_grad_(False) for each in modules())
    torch.compiler.reset()
    run = torch.compile(lambda x: COMPILED[name](module, x), fullgraph=True, backend=backend)
    torch.testing.assert_close(run(randn(2, 64)), COMPILED[name](plain, randn(2, 64)), rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


# ---- vmap of the other ops -----------------------------------------------------------------------


def test_vmap_of_quantize_and_dequantize_goes_one_by_one():
    w = randn(3, 10, 33)
    code = fourbit.codebooks.NF4.tensor()
    packed, absmax = func.vmap(lambda w: torch.ops.fourbit.quantize_4bit(w, code, 32))(w)
    run = func.vmap(lambda p, s: torch.ops.fourbit.dequantize_4bit(p, s, code, 32, [10, 33], torch.float32))
    dense = run(packed, absmax)
    for each in range(3):
        one, state = fourbit.quantize_4bit(w[each], blocksize=32)
        assert torch.equal(packed[each], one) and torch.equal(absmax[each], state.absmax)
        assert torch.equal(dense[each], fourbit.dequantize_4bit(one, state))


def test_vmap_says_what_it_cannot_do():
    packed, state = fourbit.quantize_4bit(randn(2, 4, 32), blocksize=32)

    def run(x, offsets):
        return fourbit.grouped_linear_4bit(x, offsets, packed, state)

    x = randn(2, 5, 32)
    for offsets in ([3, 2], [-(2**63), 4], [2, 6]):  # times two samples the second's first offset wraps to zero
        with pytest.raises(ValueError, match="offsets must rise from 0 to at most 5 rows"):
            func.vmap(run, in_dims=(0, None))(x, torch.tensor(offsets))
    with pytest.raises(ValueError, match="batch of size 0"):
        func.vmap(run)(x[:0], torch.zeros(0, 2, dtype=torch.int64))


# ---- the shortcut past torch's dispatcher ---------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch):
    """The arguments of every call that does not take the shortcut."""
    taken = []
    record = autograd._record
    monkeypatch.setattr(autograd, "_record", lambda *args: taken.append(args) or record(*args))
    return taken


def test_plain_tensors_take_the_shortcut(recorded):
    module, _ = modules()
    x = randn(2, 64)
    with torch.no_grad():
        module(x)
        module(nn.Parameter(x))
        module(x[:, ::1])
    assert not recorded


def test_all_others_do_not(recorded):
    packed, state = fourbit.quantize_4bit(randn(8, 64), blocksize=32)
    x, bias = randn(2, 64), randn(8)
    fourbit.linear_4bit(torch._neg_view(x), packed, state)
    fourbit.linear_4bit(x, packed, state, torch._neg_view(bias))
    fourbit.linear_4bit(x, torch._efficientzerotensor(packed.shape, dtype=torch.uint8), state)
    fourbit.linear_4bit(x.to("meta"), packed.to("meta"), state.to("meta"))
    with torch.autograd.forward_ad.dual_level():
        fourbit.linear_4bit(torch.autograd.forward_ad.make_dual(x, x), packed, state)
    assert len(recorded) == 6  # of the last call the value and the tangent


def test_a_dispatch_mode_sees_the_op():
    packed, state = fourbit.quantize_4bit(randn(2, 8, 64), blocksize=32)
    with Ops() as seen:
        fourbit.linear_4bit(randn(2, 128), *fourbit.quantize_4bit(randn(8, 128), blocksize=32))
        fourbit.grouped_linear_4bit(randn(4, 64), torch.tensor([1, 3]), packed, state)
    for op in ("linear_4bit", "grouped_linear_4bit"):
        assert f"fourbit.{op}.default" in seen.names


def test_one_tensor_elsewhere_is_refused():
    packed, state = fourbit.quantize_4bit(randn(8, 64), blocksize=32)
    with pytest.raises(ValueError, match="bias is on meta"):
        fourbit.linear_4bit(randn(2, 64), packed, state, torch.zeros(8, device="meta"))
    with pytest.raises(ValueError, match="x is on meta"):
        fourbit.linear_4bit(randn(2, 64).to("meta"), packed, state)
