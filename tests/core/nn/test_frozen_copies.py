"""What copies, loads, shares and traces a module keeps its storage frozen."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from fourbit.nn import Linear4bit
from tests.core.nn.frozen_model import DOUBLE_QUANT, Adapted, assert_guarded, assert_same, values
from tests.support import installed, skip_or_fail


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
