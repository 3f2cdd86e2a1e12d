"""Forward mode and torch.func: jvp, vjp, grad, Jacobians, Hessians and vmap, beside torch with the dense weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, func
from torch.autograd import forward_ad
from torch.nn import functional

import fourbit
from fourbit.testing.inputs import DTYPES, normal
from fourbit.testing.oracle import assert_product, assert_same_bits, make_weight

COVERS = ("linear_4bit", "linear_4bit_grad", "grouped_linear_4bit", "grouped_linear_4bit_grad", "embedding_4bit")

Function = Callable[..., Tensor]


def pair(device: torch.device, double_quant: bool = False) -> tuple[Function, Function]:
    """f(x, bias) of a weight [12, 64]: fourbit's, and torch's with the dequantized weight."""
    weight = make_weight(12, 64, double_quant=double_quant)
    packed, state, dense = weight.packed.to(device), weight.state(device), weight.dense().to(device)
    return (
        lambda x, bias=None: fourbit.linear_4bit(x, packed, state, bias),
        lambda x, bias=None: functional.linear(x, dense, bias),
    )


def experts(device: torch.device) -> tuple[Function, Function]:
    """f(x) of three experts' weights [10, 64] for rows [0, 2), none and [2, 7): fourbit's, and torch's."""
    weight, ends = make_weight(3, 10, 64), torch.tensor([2, 2, 7], device=device)
    packed, state, dense = weight.packed.to(device), weight.state(device), weight.dense().to(device)

    def plain(x: Tensor) -> Tensor:
        rest = torch.zeros_like(x[..., 7:, :10])
        return torch.cat([x[..., :2, :] @ dense[0].T, x[..., 2:7, :] @ dense[2].T, rest], dim=-2)

    return lambda x: fourbit.grouped_linear_4bit(x, ends, packed, state), plain


def curved(f: Function) -> Function:
    """A scalar function of f with derivatives of every order."""
    return lambda *args: f(*args).sin().sum()


def dual(f: Function, x: Tensor, tangent: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    """f and its derivative along `tangent`, by dual numbers."""
    with forward_ad.dual_level():
        primal, along = forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent), *rest))
        assert along is not None, "the tangent is lost"
        return primal, along


def reverse_over_forward(f: Function, x: Tensor, tangent: Tensor) -> Tensor:
    """The gradient of the derivative along `tangent`."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(dual(lambda x: f(x).sin(), x, tangent)[1].sum(), x)[0]


def forward_over_reverse(f: Function, x: Tensor, tangent: Tensor) -> Tensor:
    """The derivative along `tangent` of the gradient."""
    with forward_ad.dual_level():
        x = forward_ad.make_dual(x.clone().requires_grad_(), tangent)
        (grad,) = torch.autograd.grad(f(x).sin().sum(), x, create_graph=True)
        along = forward_ad.unpack_dual(grad).tangent
        assert along is not None, "the tangent is lost"
        return along


LINEAR: dict[str, Callable[[Function, Tensor, Tensor, Tensor, Tensor], object]] = {
    "dual numbers": lambda f, x, b, u, v: dual(f, x, u, b),
    "dual bias": lambda f, x, b, u, v: dual(lambda b: f(x, b), b, v),
    "reverse over dual": lambda f, x, b, u, v: reverse_over_forward(f, x, u),
    "dual over reverse": lambda f, x, b, u, v: forward_over_reverse(f, x, u),
    "jvp": lambda f, x, b, u, v: func.jvp(f, (x, b), (u, v)),
    "jvp of bias": lambda f, x, b, u, v: func.jvp(lambda b: f(x, b), (b,), (v,)),
    "vjp": lambda f, x, b, u, v: func.vjp(f, x, b)[1](f(u)),
    "grad": lambda f, x, b, u, v: func.grad(curved(f), argnums=(0, 1))(x, b),
    "grad of grad": lambda f, x, b, u, v: func.grad(curved(func.grad(curved(f))))(x),
    "jacrev": lambda f, x, b, u, v: func.jacrev(f, argnums=(0, 1))(x[0], b),
    "jacfwd": lambda f, x, b, u, v: func.jacfwd(f, argnums=(0, 1))(x[0], b),
    "hessian": lambda f, x, b, u, v: func.hessian(curved(f), argnums=(0, 1))(x[0], b),
    "jacrev of jacrev": lambda f, x, b, u, v: func.jacrev(func.jacrev(curved(f)))(x[0]),
    "jacrev of jacfwd": lambda f, x, b, u, v: func.jacrev(func.jacfwd(curved(f)))(x[0]),
    "jacfwd of jacfwd": lambda f, x, b, u, v: func.jacfwd(func.jacfwd(curved(f)))(x[0]),
    "vmap": lambda f, x, b, u, v: func.vmap(f, in_dims=(0, None))(x, b),
    "vmap over columns": lambda f, x, b, u, v: func.vmap(f, in_dims=1, out_dims=1)(x.T.contiguous()),
    "vmap of vmap": lambda f, x, b, u, v: func.vmap(func.vmap(f), in_dims=1)(torch.stack([x, u, x * u])),
    "vmap over biases": lambda f, x, b, u, v: func.vmap(f, in_dims=(None, 0))(x, torch.stack([b, v])),
    "vmap over both": lambda f, x, b, u, v: func.vmap(f, in_dims=(0, 1))(torch.stack([x, u]), torch.stack([b, v], 1)),
    "gradient for each sample": lambda f, x, b, u, v: func.vmap(func.grad(curved(f), (0, 1)), (0, None))(x, b),
    "grad of vmap": lambda f, x, b, u, v: func.grad(curved(func.vmap(f, in_dims=(0, None))), (0, 1))(x, b),
    "jvp of vmap": lambda f, x, b, u, v: func.jvp(func.vmap(f), (x,), (u,)),
    "vmap of jvp": lambda f, x, b, u, v: func.vmap(lambda x, u: func.jvp(f, (x,), (u,)))(x, u),
    "functionalize": lambda f, x, b, u, v: func.functionalize(f)(x, b),
}
"""Name to what is done with f at x [5, 64] and bias [12], along u and v of their shapes."""

GROUPED: dict[str, Callable[[Function, Tensor, Tensor], object]] = {
    "dual numbers": lambda f, x, u: dual(f, x, u),
    "reverse over dual": lambda f, x, u: reverse_over_forward(f, x, u),
    "dual over reverse": lambda f, x, u: forward_over_reverse(f, x, u),
    "jvp": lambda f, x, u: func.jvp(f, (x,), (u,)),
    "vjp": lambda f, x, u: func.vjp(f, x)[1](f(u)),
    "grad": lambda f, x, u: func.grad(curved(f))(x),
    "grad of grad": lambda f, x, u: func.grad(curved(func.grad(curved(f))))(x),
    **{
        f"vmap in_dims={dim}": lambda f, x, u, dim=dim: func.vmap(f, in_dims=dim)(torch.stack([x, u, x * u], dim))
        for dim in (0, 1, 2)
    },
    "vmap of vmap": lambda f, x, u: func.vmap(func.vmap(f), in_dims=1)(torch.stack([x, u, x * u])[None]),
    "gradient for each sample": lambda f, x, u: func.vmap(func.grad(curved(f)))(torch.stack([x, u])),
    "grad of vmap": lambda f, x, u: func.grad(curved(func.vmap(f)))(torch.stack([x, u])),
}
"""The same for f of x [8, 64]."""


def assert_alike(ours: object, want: object) -> None:
    """Close, relative to the size of the largest element: float32 products, summed in another order."""
    for a, b in zip(*(torch.utils._pytree.tree_leaves(each) for each in (ours, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(float(b.detach().abs().max()), 1.0))


@pytest.mark.parametrize("double_quant", (False, True), ids=("plain", "double"))
@pytest.mark.parametrize("name", LINEAR)
def test_linear(need, device, name, double_quant):
    for op in ("linear_4bit", "linear_4bit_grad"):
        need(op, double_quant=double_quant)
    inputs = [normal(*shape, seed=seed).to(device) for seed, shape in enumerate(((5, 64), (12,), (5, 64), (12,)))]
    ours, want = (LINEAR[name](f, *inputs) for f in pair(device, double_quant))
    assert_alike(ours, want)


@pytest.mark.parametrize("name", GROUPED)
def test_grouped(need, device, name):
    for op in ("grouped_linear_4bit", "grouped_linear_4bit_grad"):
        need(op)
    x, along = normal(8, 64).to(device), normal(8, 64, seed=1).to(device)
    ours, want = (GROUPED[name](f, x, along) for f in experts(device))
    assert_alike(ours, want)


def test_each_sample_routes_by_itself(need, device):
    """vmap over the offsets: an order of the experts for every sample."""
    need("grouped_linear_4bit")
    weight, x = make_weight(2, 6, 64), normal(2, 5, 64).to(device)
    packed, state = weight.packed.to(device), weight.state(device)
    ends = torch.tensor([[1, 5], [4, 4]], device=device)
    out = func.vmap(lambda x, ends: fourbit.grouped_linear_4bit(x, ends, packed, state))(x, ends)
    for sample in (0, 1):
        assert_same_bits(
            out[sample], fourbit.grouped_linear_4bit(x[sample], ends[sample], packed, state).cpu(), f"sample {sample}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", (0, 1, 2))
def test_vmap_is_within_the_bounds_of_the_product(need, device, dim, dtype):
    need("linear_4bit", dtype)
    weight, x = make_weight(12, 64), normal(3, 5, 64).to(device, dtype)
    packed, state = weight.packed.to(device), weight.state(device)
    out = func.vmap(lambda x: fourbit.linear_4bit(x, packed, state), in_dims=dim)(x.movedim(0, dim))
    assert_product(out, x, weight.dense().T, dtype)


@pytest.mark.parametrize("dim", (0, 1))
def test_vmap_of_the_embedding(need, device, dim):
    need("embedding_4bit")
    weight, ids = make_weight(11, 70), torch.tensor([[0, 10, 3], [7, 7, 1]], device=device)
    packed, state = weight.packed.to(device), weight.state(device)
    rows = func.vmap(lambda ids: fourbit.embedding_4bit(ids, packed, state), in_dims=dim, out_dims=dim)(ids)
    assert_same_bits(rows, weight.dense()[ids.cpu()], "rows")
