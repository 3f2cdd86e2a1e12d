"""The storage of packed weights: moved and read by all, calculated with by nobody."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn
from torch.optim import swa_utils
from torch.utils._pytree import tree_leaves

from fourbit.nn import Linear4bit
from fourbit.nn.frozen import CHUNK, frozen
from tests.core.nn.frozen_model import DOUBLE_QUANT, Adapted, assert_same, storage, values

# ---- averages of models -----------------------------------------------------------------------------------

AVERAGES = {
    "default": {},
    "ema": {"avg_fn": swa_utils.get_ema_avg_fn(0.9)},
    "ema, many at once": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
    "swa": {"avg_fn": swa_utils.get_swa_avg_fn()},
}


@DOUBLE_QUANT
@pytest.mark.parametrize("use_buffers", (False, True))
@pytest.mark.parametrize("how", AVERAGES)
def test_averages_of_a_trained_adapter(how, use_buffers, double_quant):
    """The adapter's average as without the frozen layer, whose bits stay."""
    model = Adapted(double_quant)
    averaged = swa_utils.AveragedModel(model, use_buffers=use_buffers, **AVERAGES[how])
    alone = swa_utils.AveragedModel(copy.deepcopy(model.adapter), **AVERAGES[how])
    before = values(model)
    for _ in range(10):
        averaged.update_parameters(model)
        alone.update_parameters(model.adapter)
        with torch.no_grad():
            model.adapter.weight.add_(torch.randn_like(model.adapter.weight))
    assert_same(averaged.module, before)
    torch.testing.assert_close(averaged.module.adapter.weight, alone.module.weight)
    x = torch.randn(3, 96)
    torch.testing.assert_close(averaged(x), model.base(x) + alone(x))


@DOUBLE_QUANT
@pytest.mark.parametrize("how", AVERAGES)
def test_averages_of_different_weights_are_refused(how, double_quant):
    model = Adapted(double_quant)
    averaged = swa_utils.AveragedModel(model, **AVERAGES[how])
    averaged.update_parameters(model)
    before = values(averaged.module)
    model.base.store(torch.randn(64, 96))
    with pytest.raises(TypeError, match="frozen 4-bit weight.*parameters that require a gradient"):
        averaged.update_parameters(model)
    assert_same(averaged.module, before)


def test_the_default_of_cuda_is_refused_with_advice_that_works():
    model = Adapted()
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_swa_multi_avg_fn())
    averaged.update_parameters(model)
    before = values(model)
    with pytest.raises(RuntimeError, match=r"avg_fn=get_swa_avg_fn\(\)"):
        averaged.update_parameters(model)
    assert_same(averaged.module, before)


def test_averages_of_the_trained_parameters():
    """The message's other advice."""
    model, average = Adapted(), Adapted()
    trained = [[p for p in m.parameters() if p.requires_grad] for m in (average, model)]
    before = values(average)
    with torch.no_grad():
        model.adapter.weight.add_(1)
    want = torch.lerp(average.adapter.weight, model.adapter.weight, 0.25)
    swa_utils.get_ema_multi_avg_fn(0.75)(*trained, None)
    torch.testing.assert_close(average.adapter.weight, want)
    assert_same(average, before)


def test_averages_of_state_dicts_by_hand():
    model = Adapted()
    state, before = model.state_dict(), values(model)
    for value in state.values():
        if value.is_floating_point():
            value.lerp_(value + 1, 0.5)
        else:
            value.copy_(0.9 * value + 0.1 * value)  # equal: left alone
            with pytest.raises(TypeError, match="frozen"):
                value.copy_(0.9 * value + 0.1 * ~value)
    assert_same(model, before)
    with pytest.raises(RuntimeError, match=r"qweight: want torch\.uint8, got torch\.float32"):
        model.load_state_dict({name: 0.5 * value + 0.5 * value for name, value in state.items()})
    assert_same(model, before)


@pytest.mark.parametrize("where", (0, CHUNK - 1, CHUNK, 2 * CHUNK))
def test_one_difference_is_seen_wherever_it_is(where):
    bits = torch.randint(-(2**31), 2**31 - 1, (2 * CHUNK + 1,), dtype=torch.int32)
    target = frozen(bits.clone(), parameter=False)
    numbers = 0.999 * bits + (1 - 0.999) * bits
    target.copy_(numbers)
    assert torch.equal(target, bits)
    for other in (numbers[where] * 1.001 + 1, torch.nan):
        changed = numbers.clone()
        changed[where] = other
        with pytest.raises(TypeError):
            target.copy_(changed)
    assert torch.equal(target, bits)


# ---- other arithmetic -------------------------------------------------------------------------------------

WRITES = {
    "add_": lambda t: t.add_(1),
    "+=": lambda t: t.__iadd__(1),
    "data +=": lambda t: exec("t.data += 1", {"t": t}),
    "data *=": lambda t: exec("t.data *= 0.5", {"t": t}),
    "sub_": lambda t: torch.Tensor.sub_(t, 1),
    "item": lambda t: t.__setitem__(0, 1),
    "data": lambda t: t.data.mul_(2),
    "detached": lambda t: t.detach().fill_(1),
    "a view": lambda t: t.view(-1)[:3].random_(),
    "a chunk": lambda t: t.chunk(2)[0].bitwise_not_(),
    "another dtype": lambda t: t.detach().view(torch.uint8).bitwise_not_(),
    "out": lambda t: torch.add(t, 1, out=t),
    "foreach": lambda t: torch._foreach_add_([t], 1),
    "copy_ of floats": lambda t: t.copy_(t * 1.5),
    "copy_ of another integer": lambda t: t.copy_(t.long() + 1),
    "set data": lambda t: setattr(t, "data", t.float()),
    "init": nn.init.uniform_,
    "init of zero mean": nn.init.normal_,
    "an op's overload": lambda t: torch.ops.aten.add_.Tensor(t, torch.ones_like(t)),
    "clamp_": lambda t: t.clamp_(0, 1),
}


@DOUBLE_QUANT
@pytest.mark.parametrize("how", WRITES)
def test_writes_are_refused(how, double_quant):
    model = Adapted(double_quant)
    before = values(model)
    for name, tensor in storage(model).items():
        with pytest.raises((TypeError, RuntimeError), match="frozen 4-bit weight"), torch.no_grad():
            WRITES[how](tensor)
        assert_same(model, before), name


def test_what_reads_gets_ordinary_numbers():
    model = Adapted()
    qweight = model.base.qweight
    for result in tree_leaves(
        (qweight * 0.5, qweight >> 4, qweight.float(), qweight.sum(), qweight.clone(), qweight.to(torch.int64))
    ):
        assert type(result) is torch.Tensor
    assert torch.equal((qweight >> 4) & 15, torch.from_numpy(qweight.numpy() >> 4))
    assert torch.zeros(64, 48).copy_(qweight).equal(qweight.float())
    assert "FrozenCodes" in repr(qweight) and qweight.shape == (64, 48) and not qweight.requires_grad


def test_ops_as_compiled_graphs_call_them():
    """They get ordinary tensors, in lists too, and no long way round: a graph calls three a layer and step."""
    layer = Linear4bit.from_linear(nn.Linear(64, 32, bias=False))
    x = torch.randn(3, 64)
    calls = []

    def op():
        absmax, code = (torch.ops.aten.view.dtype(t, torch.float32) for t in (layer.scales, layer.codebook))
        return torch.ops.fourbit.linear_4bit.default(x, layer.qweight, absmax, code, layer.blocksize, 32, bias=None)

    assert torch.equal(op(), layer(x))
    sys.setprofile(lambda _, event, __: calls.append(event))
    try:
        op()
    finally:
        sys.setprofile(None)
    assert calls.count("call") < 90  # it was 313 by way of torch's pytrees
    for found in (
        torch.ops.aten.view.dtype(layer.scales, torch.float32),
        torch.ops.aten.cat.default([layer.qweight, layer.qweight]),
        torch.ops.aten.split.Tensor(layer.qweight, 16)[1],
    ):
        assert type(found) is torch.Tensor
    with pytest.raises(RuntimeError, match="frozen 4-bit weight"):
        torch.ops.aten.mul.out(layer.qweight, layer.qweight, out=layer.qweight)


def test_those_who_take_all_parameters():
    model = Adapted(double_quant=True)
    before = values(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 96)).square().sum().backward()
    assert torch.isfinite(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    optimizer.step()
    optimizer.zero_grad()
    assert_same(model, before)
    with pytest.raises(TypeError, match="cat: .*that require a gradient"):
        nn.utils.parameters_to_vector(model.parameters())
    with pytest.raises(TypeError, match="frozen 4-bit weight"):
        nn.utils.vector_to_parameters(torch.zeros(10**5), model.parameters())
    assert_same(model, before)
    vector = nn.utils.parameters_to_vector(p for p in model.parameters() if p.requires_grad)
    assert vector.shape == (64 * 96 + 64,)


def test_moves_of_bits():
    model, other = Adapted(seed=0), Adapted(seed=1)
    with torch.no_grad():
        for name, tensor in storage(model).items():
            storage(other)[name].copy_(tensor)
    assert_same(other, values(model))
    other.base.qweight.data.zero_()
    assert not other.base.qweight.any()
    nn.Parameter(other.base.qweight, requires_grad=False)  # torch makes Parameters of parameters
