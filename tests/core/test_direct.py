"""Products past torch's dispatcher: that plain training calls take that way, and that nothing else is changed by it."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import fourbit
from fourbit import autograd, plugins, registry
from fourbit.reference import ReferenceBackend
from tests.core.modes import Ops

OUT, IN, ROWS = 8, 64, 3


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear_layer(bias=True, seed=0, **options):
    torch.manual_seed(seed)
    config = fourbit.QuantConfig(blocksize=32, **options)
    return fourbit.nn.Linear4bit.from_linear(nn.Linear(IN, OUT, bias=bias), config)


def expert_layer(**options):
    config = fourbit.QuantConfig(blocksize=32, **options)
    return fourbit.nn.ExpertWeights4bit.from_parameter(randn(2, OUT, IN), config)


ENDS = torch.tensor([1, 3])


def functions(layer, experts):
    """The products of two layers by the public functions."""
    packed, state = layer.quant_state()
    several, experts_state = experts.quant_state()
    bias = layer.bias.detach()
    return (
        lambda x: fourbit.linear_4bit(x, packed, state, bias),
        lambda x: fourbit.grouped_linear_4bit(x, ENDS, several, experts_state),
    )


def calls():
    """Name to f and the op's name: f(x) is a product by a layer or by a public function."""
    found = {"layer without bias": (linear_layer(False), "linear_4bit")}
    for word, nested in (("", False), ("double ", True)):
        layer, experts = linear_layer(double_quant=nested), expert_layer(double_quant=nested)
        function, grouped = functions(layer, experts)
        found |= {
            f"{word}layer": (layer, "linear_4bit"),
            f"{word}function": (function, "linear_4bit"),
            f"{word}experts": (partial(experts, offsets=ENDS), "grouped_linear_4bit"),
            f"{word}experts' function": (grouped, "grouped_linear_4bit"),
        }
    return found


CALLS = calls()
every_call = pytest.mark.parametrize("name", CALLS)


@pytest.fixture
def trips(monkeypatch):
    """The ops that come to the dispatcher from fourbit's own code."""
    seen = []

    def counted(name, call):
        return lambda *args: seen.append(name) or call(*args)

    monkeypatch.setattr(autograd, "_calls", {name: counted(name, call) for name, call in autograd._calls.items()})
    monkeypatch.setattr(fourbit.nn.linear, "_linear_4bit", counted("linear_4bit", fourbit.nn.linear._linear_4bit))
    monkeypatch.setattr(fourbit.nn.experts, "_calls", {n: counted(n, c) for n, c in fourbit.nn.experts._calls.items()})
    return seen


class Functions(TorchFunctionMode):
    """The names of the functions that come to a function mode; as Ops."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Labelled(torch.Tensor):
    """A subclass that torch's own rule keeps: results of it are of it."""

    seen = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs)


def step(f, forward=nullcontext, backward=nullcontext, x=None):
    """Output and gradient of f at x, inside those contexts."""
    x = randn(ROWS, IN, seed=1).requires_grad_() if x is None else x
    with forward():
        y = f(x)
    loss = y.float().tanh().sum()
    with backward():
        (grad,) = torch.autograd.grad(loss, x)
    return y, grad


def assert_same(ours, want):
    for a, b in zip(ours, want, strict=True):
        assert type(a) is type(b) and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# ---- the way past ------------------------------------------------------------------------------------------


@every_call
def test_plain_calls_go_past(trips, name):
    f, _ = CALLS[name]
    step(f)
    with torch.no_grad():
        f(randn(ROWS, IN))
        f(nn.Parameter(randn(ROWS, IN)))
    step(lambda x: checkpoint(f, x, use_reentrant=False))
    checkpoint(f, randn(ROWS, IN).requires_grad_(), use_reentrant=True).sum().backward()
    strided = randn(IN, ROWS).T
    assert_same(step(f, x=strided.detach().requires_grad_()), step(f, x=strided.contiguous().requires_grad_()))
    with torch.inference_mode():
        assert f(randn(ROWS, IN)).is_inference()
    assert not trips


@every_call
def test_gradients_are_those_of_the_dispatchers_way(monkeypatch, name):
    f, _ = CALLS[name]
    ours = step(f)
    for module in (autograd, fourbit.nn.linear, fourbit.nn.experts):
        monkeypatch.setattr(module, "undisturbed", lambda x: False)
    monkeypatch.setattr(autograd, "PLAIN", frozenset())
    assert_same(ours, step(f))


DISTURBANCES = {
    "dispatch mode": Ops,
    "function mode": Functions,
    "default device": lambda: torch.device("cpu"),
    "profiler": lambda: torch.autograd.profiler.profile(use_cpu=True),
    "forward AD": forward_ad.dual_level,
}


@every_call
@pytest.mark.parametrize("during", ["forward", "backward"])
@pytest.mark.parametrize("what", DISTURBANCES)
def test_whatever_is_going_on_is_served(trips, what, during, name):
    f, _ = CALLS[name]
    want = step(f)
    assert not trips
    ours = step(f, **{during: DISTURBANCES[what]})
    if during == "forward":
        assert trips or "function" in name  # the public functions call the op themselves
    else:
        assert trips or what in ("function mode", "default device")  # which are not there for the engine
    assert_same(ours, want)


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype=dtype)


@every_call
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16], ids=str)
def test_autocast_casts_on_the_way_past(trips, monkeypatch, name, x_dtype):
    f, _ = CALLS[name]
    x = randn(ROWS, IN, seed=1, dtype=x_dtype).requires_grad_()
    ours = step(f, forward=autocast, x=x)
    assert ours[0].dtype == torch.bfloat16 and ours[1].dtype == x_dtype
    if "function" not in name:
        assert not trips
        for module in (fourbit.nn.linear, fourbit.nn.experts):
            monkeypatch.setattr(module, "undisturbed", lambda x: False)
        want = step(f, forward=autocast, x=x)
        assert trips
        assert_same(ours, want)
    if x_dtype == torch.float32:
        torch.testing.assert_close(ours[0].float(), f(x), rtol=0.02, atol=0.02)


@every_call
def test_autocast_during_backward(name):
    """The gradient is no op that autocast knows: of torch's matmul, where a backend is composed of it, it is one."""
    f, _ = CALLS[name]
    want, ours = step(f), step(f, backward=autocast)
    assert ours[1].dtype == torch.float32
    torch.testing.assert_close(ours, want, rtol=0.02, atol=0.02)


@every_call
def test_autocast_during_a_second_backward(trips, name):
    """The gradient's own is the op itself, which autocast casts."""
    f, op = CALLS[name]
    x = randn(ROWS, IN, seed=1).requires_grad_()
    (first,) = torch.autograd.grad(f(x).sin().sum(), x, create_graph=True)
    loss = first.square().sum()
    (want,) = torch.autograd.grad(loss, x, retain_graph=True)
    trips.clear()
    with autocast():
        (ours,) = torch.autograd.grad(loss, x)
    assert op in trips
    assert ours.dtype == torch.float32 and not torch.equal(ours, want)
    torch.testing.assert_close(ours, want, rtol=0.05, atol=0.05 * float(want.abs().max()))


def test_autocast_for_another_device_changes_nothing(trips):
    torch.set_autocast_enabled("cuda", True)  # torch.autocast would not where there is no such device
    try:
        y = linear_layer()(randn(ROWS, IN))
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert y.dtype == torch.float32 and not trips


@every_call
def test_modes_and_profilers_see_the_ops(name):
    f, op = CALLS[name]
    gradient = f"{op}_grad"
    for kind in (Ops, Functions):
        with kind() as mode:
            step(f)
        names = " ".join(mode.names)
        assert f"fourbit.{op}.default" in names
        assert kind is Functions or f"fourbit.{gradient}.default" in names
    with torch.autograd.profiler.profile(use_cpu=True) as profile:
        step(f)
    seen = {event.key for event in profile.key_averages()}
    assert {f"fourbit::{op}", f"fourbit::{gradient}"} <= seen


@every_call
def test_create_graph(trips, name):
    """The gradient is differentiable, and its derivative right: that of the sum of its squares."""
    f, op = CALLS[name]
    dense = torch.autograd.functional.jacobian(lambda x: f(x).sum(0), randn(ROWS, IN))
    trips.clear()
    x = randn(ROWS, IN, seed=1).requires_grad_()
    (first,) = torch.autograd.grad(f(x).sin().sum(), x, create_graph=True)
    assert f"{op}_grad" in trips and first.requires_grad
    (second,) = torch.autograd.grad(first.square().sum(), x)

    w = dense  # [out, rows, in]: the matrix of each row
    y = torch.einsum("ork,rk->ro", w, x.detach()) + (f(torch.zeros(ROWS, IN)).detach())
    want_first = torch.einsum("ork,ro->rk", w, y.cos())
    inner = torch.einsum("ork,rk->ro", w, want_first)
    want_second = torch.einsum("ork,ro->rk", w, -2 * y.sin() * inner)
    torch.testing.assert_close(first.detach(), want_first, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second, want_second, rtol=1e-4, atol=1e-4 * float(want_second.abs().max()))


@every_call
def test_batched_gradients(name):
    f, _ = CALLS[name]
    x = randn(ROWS, IN, seed=1).requires_grad_()
    y = f(x)
    several = torch.stack([randn(ROWS, OUT, seed=seed) for seed in range(3)])
    (batched,) = torch.autograd.grad(y, x, several, is_grads_batched=True, retain_graph=True)
    for each, grad in zip(several, batched, strict=True):
        torch.testing.assert_close(torch.autograd.grad(y, x, each, retain_graph=True)[0], grad)


@every_call
def test_views_that_are_no_memory_as_it_is(name):
    """Of negated x, and of a negated gradient, as torch's complex numbers make them."""
    f, _ = CALLS[name]
    with torch.no_grad():
        assert_same([f(torch._neg_view(randn(ROWS, IN)))], [f(-randn(ROWS, IN))])
    layer, negated = linear_layer(), {"bias": torch._neg_view(randn(OUT))}
    want = torch.func.functional_call(layer, {"bias": -randn(OUT)}, randn(ROWS, IN))
    assert_same([torch.func.functional_call(layer, negated, randn(ROWS, IN))], [want])
    x, experts = randn(ROWS, IN, seed=1).requires_grad_(), expert_layer()
    assert_same([experts(x, torch._neg_view(-ENDS))], [experts(x, ENDS)])
    y = f(x)
    up = randn(ROWS, OUT, seed=2)
    ours = torch.autograd.grad(y, x, torch._neg_view(up), retain_graph=True)
    assert_same(ours, torch.autograd.grad(y, x, -up))


@every_call
def test_subclasses_stay_themselves(trips, name):
    f, op = CALLS[name]
    Labelled.seen.clear()
    y = f(randn(ROWS, IN, seed=1).as_subclass(Labelled))
    assert type(y) is Labelled and f"fourbit.{op}.default" in " ".join(map(str, Labelled.seen))
    assert_same([y.as_subclass(torch.Tensor)], [f(randn(ROWS, IN, seed=1))])


@every_call
def test_gradients_past_a_transform(name):
    """Of what is no argument of the function that is transformed."""
    f, _ = CALLS[name]
    x, factors = randn(ROWS, IN, seed=1).requires_grad_(), randn(4, ROWS, 1, seed=2)
    ours = torch.autograd.grad(torch.func.vmap(lambda factor: f(x) * factor)(factors).sum(), x)
    torch.testing.assert_close(ours, torch.autograd.grad((f(x) * factors.sum(0)).sum(), x))


@every_call
def test_below_autograd_nothing_is_recorded(name):
    f, _ = CALLS[name]
    with torch._C._AutoDispatchBelowAutograd():
        assert f(randn(ROWS, IN).requires_grad_()).grad_fn is None


@every_call
def test_graphs_hold_the_op(name):
    f, op = CALLS[name]

    def both(x):
        x = x.detach().requires_grad_()
        y = f(x)
        return y.detach(), *torch.autograd.grad(y.sum(), x)

    graph = make_fx(both)(randn(ROWS, IN))
    assert f"fourbit.{op}.default" in graph.code and f"fourbit.{op}_grad.default" in graph.code
    assert_same(graph(randn(ROWS, IN, seed=1)), both(randn(ROWS, IN, seed=1)))


@every_call
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "trace",
    [
        lambda f, x: make_fx(f, pre_dispatch=True)(x),
        lambda f, x: torch.jit.trace(f, x, check_trace=False),
    ],
    ids=["fx", "jit"],
)
def test_traces_hold_the_op(name, trace):
    f, op = CALLS[name]
    try:
        with torch.no_grad():
            run = trace(lambda x: f(x), randn(ROWS, IN))
    except RuntimeError as error:  # torch's tracers know no views of other dtypes, and no bias that requires a gradient
        assert "function" not in name
        assert any(word in str(error) for word in ("aten::view", "NotImplemented", "as a constant"))
        return
    assert op in str(run.graph)
    assert_same([run(randn(ROWS, IN, seed=1))], [f(randn(ROWS, IN, seed=1))])


@pytest.mark.parametrize("name", ["layer", "experts"])
def test_compiled_whole(name):
    f, _ = CALLS[name]
    torch.compiler.reset()
    compiled = torch.compile(lambda x: f(x), fullgraph=True, backend="aot_eager")
    assert_same(step(compiled), step(f))
    torch.compiler.reset()


# ---- what is saved for backward ------------------------------------------------------------------------------


@every_call
def test_saved_tensors_can_be_packed_away(name):
    f, _ = CALLS[name]
    want = step(f)
    saved = []
    f(randn(ROWS, IN).requires_grad_())  # made once, what is kept with the layer
    with saved_tensors_hooks(lambda t: saved.append(t) or t.clone(), lambda t: t.clone()):
        ours = step(f)
    assert_same(ours, want)
    weight_parts = (6 if "double" in name else 3) + ("experts" in name)
    assert len(saved) == weight_parts + 1  # and tanh's
    assert_same(step(f, forward=save_on_cpu), want)


@every_call
@pytest.mark.parametrize("where", ["default", "each"])
def test_a_hook_that_gives_another_tensor_is_found_out(name, where):
    """Kernels trust sizes: they must be looked at again where a saved tensor may be another."""
    f, _ = CALLS[name]
    x = randn(ROWS, IN).requires_grad_()
    if where == "default":
        with saved_tensors_hooks(lambda t: t, lambda t: t.reshape(-1)[:1]):
            y = f(x)
    else:
        y = f(x)
        node = y.grad_fn
        for raw, saved in zip(node._raw_saved_tensors, node.saved_tensors, strict=True):
            if saved is not None:
                raw.register_hooks(lambda t: t, lambda t: t.reshape(-1)[:1])
    with pytest.raises((ValueError, TypeError), match="linear_4bit_grad: "):
        torch.autograd.grad(y.sum(), x)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("part", ["qweight", "scales", "codebook", "nested_scales"])
def test_a_weight_written_to_in_between_is_found_out(part, nested):
    if part == "nested_scales" and not nested:
        return
    for again in range(2):  # what is kept with the layer counts writings as the layer's own tensors do
        layer = linear_layer(double_quant=nested)
        for _ in range(again):
            layer(randn(ROWS, IN))
        y = layer(randn(ROWS, IN).requires_grad_())
        getattr(layer, part).copy_(getattr(layer, part).clone())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@every_call
def test_a_graph_serves_once_unless_it_is_retained(name):
    f, _ = CALLS[name]
    x = randn(ROWS, IN).requires_grad_()
    y = f(x)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert_same(torch.autograd.grad(y.sum(), x, retain_graph=True), first)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_a_weight_elsewhere_is_left_to_the_op():
    packed, state = linear_layer().quant_state()
    elsewhere = state.to("meta").weight(packed.to("meta"))
    for x in (randn(ROWS, IN), randn(ROWS, IN).requires_grad_()):
        assert autograd.linear(x, elsewhere, OUT, None) is None


def test_only_what_is_asked_for():
    layer = linear_layer()
    x = randn(ROWS, IN).requires_grad_()
    (to_bias,) = torch.autograd.grad(layer(x.detach()).sum(), layer.bias)
    torch.testing.assert_close(to_bias, torch.full((OUT,), float(ROWS)))
    layer.bias.requires_grad_(False)
    assert layer(x.detach()).grad_fn is None
    torch.testing.assert_close(*(step(layer, x=each)[1] for each in (x, x.detach().requires_grad_())))


# ---- backends -----------------------------------------------------------------------------------------------


class Views(ReferenceBackend):
    """Returns views, as a product that was computed in two dimensions."""

    name = "views"
    priority = 900

    def linear_4bit(self, x, weight, out_features, bias=None):
        return super().linear_4bit(x, weight, out_features, bias).reshape(-1).view(*x.shape[:-1], out_features)

    def linear_4bit_grad(self, grad, weight, in_features):
        assert grad.is_contiguous()
        return super().linear_4bit_grad(grad, weight, in_features).reshape(-1).view(*grad.shape[:-1], in_features)


@contextmanager
def registered(backend):
    plugins.load()
    registry.register(backend)
    try:
        yield
    finally:
        registry.unregister(backend.name)


def test_results_can_be_added_to_in_place():
    with registered(Views()), fourbit.use_backend("views"):
        for f in (linear_layer(), CALLS["function"][0]):
            x = randn(ROWS, IN).requires_grad_()
            y = f(x)
            want = torch.autograd.grad(y.sum() * 2, x)
            y = f(x)
            assert not y._is_view()
            y += 1
            y *= 2
            assert_same(torch.autograd.grad(y.sum(), x), want)
            y = f(x)
            assert torch.autograd.grad(y.T, x, randn(OUT, ROWS))[0].shape == x.shape  # strided: see the assertion


def test_the_backend_is_that_of_the_moment():
    layer = linear_layer()
    calls = []

    class Counted(ReferenceBackend):
        name = "counted"
        priority = 900

        def linear_4bit(self, *args):
            calls.append("linear")
            return super().linear_4bit(*args)

        def linear_4bit_grad(self, *args):
            calls.append("grad")
            return super().linear_4bit_grad(*args)

    x = randn(ROWS, IN).requires_grad_()
    layer(x).sum().backward()
    with registered(Counted()), fourbit.use_backend("counted"):
        y = layer(x)
        y.sum().backward()
        y = layer(x)
    assert calls == ["linear", "grad", "linear"]
    y.sum().backward()
    assert calls == ["linear", "grad", "linear"]


# ---- arguments that do not fit ---------------------------------------------------------------------------------


def test_layers_say_what_is_wrong():
    layer, experts = linear_layer(), expert_layer()
    layer(randn(ROWS, IN)), experts(randn(ROWS, IN), ENDS)  # what was looked up before must not be trusted with these
    for x in (randn(ROWS, IN), randn(ROWS, IN).requires_grad_()):
        with pytest.raises(TypeError, match="linear_4bit: x must be float32, bfloat16 or float16, got torch.float64"):
            linear_layer(False)(x.double())
        with pytest.raises(ValueError, match=r"x has shape \[3, 63\]"):
            layer(x[:, 1:])
        with pytest.raises(ValueError, match="offsets must rise from 0 to at most 3 rows"):
            experts(x, torch.tensor([3, 1]))
        with pytest.raises(TypeError, match="offsets must be int32 or int64"):
            experts(x, torch.tensor([1.0, 3.0]))
        with pytest.raises(
            ValueError, match=r"offsets \[3\] do not fit the weight \[experts, out, in\] = \[2, 8, 64\]"
        ):
            experts(x, torch.tensor([1, 2, 3]))
        with pytest.raises(ValueError, match="bias must have shape"):
            torch.func.functional_call(layer, {"bias": torch.zeros(OUT + 1)}, (x,))
        with pytest.raises(ValueError, match="is on meta"):
            layer(x.to("meta"))
