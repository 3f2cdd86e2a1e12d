"""The storage of packed weights: moved and read by all, calculated with by nobody."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim import swa_utils
from torch.utils._pytree import tree_leaves

import fourbit
from fourbit.nn import Linear4bit
from fourbit.nn.frozen import CHUNK, FrozenTensor, frozen
from fourbit.nn.packed import _STORAGE
from tests.support import installed, skip_or_fail

DOUBLE_QUANT = pytest.mark.parametrize("double_quant", (False, True), ids=("plain", "double"))


class Adapted(nn.Module):
    """A frozen layer with a trained one beside it, as QLoRA has them."""

    def __init__(self, double_quant=False, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.base = Linear4bit.from_linear(nn.Linear(96, 64), fourbit.QuantConfig(double_quant=double_quant))
        self.base.bias.requires_grad_(False)
        self.adapter = nn.Linear(96, 64)

    def forward(self, x):
        return self.base(x) + self.adapter(x)


def storage(model):
    return {name: getattr(model.base, name) for name in _STORAGE if hasattr(model.base, name)}


def values(model):
    return {name: tensor.clone() for name, tensor in storage(model).items()}


def assert_same(model, before):
    for name, tensor in storage(model).items():
        assert torch.equal(tensor, before[name]), name


def assert_guarded(model):
    for name, tensor in storage(model).items():
        assert type(tensor) is FrozenTensor, f"{name} is a {type(tensor).__name__}"
        assert isinstance(tensor, nn.Parameter) == (name in ("qweight", "scales"))
    assert {"base.qweight", "base.scales", "adapter.weight"} <= {name for name, _ in model.named_parameters()}


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
    assert "FrozenTensor" in repr(qweight) and qweight.shape == (64, 48) and not qweight.requires_grad


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


# ---- what keeps the guard ---------------------------------------------------------------------------------


def _torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _assign(model):
    other = Adapted(model.base.double_quant, seed=5)
    other.load_state_dict(_state_through_a_file(model.state_dict()), assign=True)
    return other


def _state_through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)  # ordinary tensors, which need no fourbit
    assert {type(value) for value in loaded.values()} == {torch.Tensor}
    return loaded


def _with_flag(flag):
    def convert(model):
        getattr(torch.__future__, f"set_{flag}")(True)
        try:
            return copy.deepcopy(model).to(torch.bfloat16).float()
        finally:
            getattr(torch.__future__, f"set_{flag}")(False)

    return convert


def _loaded_by_swapping(model):
    other = Adapted(model.base.double_quant, seed=5)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        other.load_state_dict(model.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    return other


def _emptied(model):
    other = Adapted(model.base.double_quant, seed=5).to("meta").to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    return other


COPIES = {
    "itself": lambda m: m,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": _torch_save,
    "half": lambda m: copy.deepcopy(m).half(),
    "double": lambda m: copy.deepcopy(m).double(),
    "type": lambda m: copy.deepcopy(m).type(torch.float16),
    "share_memory": lambda m: copy.deepcopy(m).share_memory(),
    "assign": _assign,
    "swap": _with_flag("swap_module_params_on_conversion"),
    "overwrite": _with_flag("overwrite_module_params_on_conversion"),
    "load by swapping": _loaded_by_swapping,
    "to_empty": _emptied,
}


@DOUBLE_QUANT
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_guarded_too(how, double_quant):
    model = Adapted(double_quant)
    copied = COPIES[how](model)
    assert_guarded(copied)
    assert_same(copied, values(model))
    copied.float()
    x = torch.randn(2, 96)
    assert torch.equal(copied.base.dequantize(), model.base.dequantize())
    assert copied(x).shape == (2, 64)


def test_assigned_tensors_are_guarded():
    model = Adapted()
    qweight = nn.Parameter(torch.zeros(64, 48, dtype=torch.uint8), requires_grad=False)
    model.base.qweight = qweight
    model.base.codebook = model.base.codebook.clone()
    assert model.base.qweight is qweight
    assert_guarded(model)


@pytest.mark.parametrize("how", ("itself", "deepcopy", "pickle", "torch.save", "half", "share_memory", "to_empty"))
def test_a_shared_parameter_stays_shared(how):
    model = Adapted()
    model.other = Linear4bit(96, 64, bias=False)
    model.other.qweight = model.base.qweight
    if how == "to_empty":
        copied = copy.deepcopy(model).to_empty(device="cpu")
    else:
        copied = COPIES[how](model)
    assert copied.other.qweight is copied.base.qweight
    assert_guarded(copied)


def test_another_process_gets_the_shared_storage():
    import torch.multiprocessing as mp

    model = Adapted(double_quant=True)
    queue = mp.get_context("spawn").SimpleQueue()
    queue.put(model)
    received = queue.get()
    assert_guarded(received)
    assert_same(received, values(model))
    model.base.store(torch.randn(64, 96))
    assert_same(received, values(model))


def test_offloading():
    if not installed("accelerate"):
        skip_or_fail("accelerate is not installed")
    from accelerate import cpu_offload

    model = Adapted(double_quant=True)
    x, before = torch.randn(2, 96), values(model)
    want = model(x)
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert torch.equal(offloaded(x), want) and torch.equal(offloaded(x), want)
    assert_same(model, before)


@pytest.mark.parametrize("mode", ("fake", "make_fx", "export", "strict export", "functional_call"))
def test_tracing(mode):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    model, x = Adapted(double_quant=True), torch.randn(2, 96)
    want = model(x)
    if mode == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            assert model(fake.from_tensor(x)).shape == want.shape
    elif mode == "make_fx":
        torch.testing.assert_close(make_fx(model)(x)(x), want)
    elif mode == "functional_call":
        other = dict(Adapted(double_quant=True, seed=3).named_parameters())
        assert not torch.equal(torch.func.functional_call(model, other, (x,)), want)
        assert torch.equal(torch.func.functional_call(model, dict(model.named_parameters()), (x,)), want)
    else:
        exported = torch.export.export(model, (x,), strict=mode == "strict export")
        torch.testing.assert_close(exported.module()(x), want)
        assert "base.qweight" in exported.state_dict
