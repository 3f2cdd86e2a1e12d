"""The `.weight` view: reads dequantize, writes requantize, products run on the packed weight."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import fourbit
from fourbit.nn import ExpertWeights4bit, Linear4bit, WeightView


@pytest.fixture(params=[False, True], ids=["plain", "double_quant"])
def module(request):
    torch.manual_seed(0)
    return Linear4bit.from_linear(nn.Linear(96, 64), fourbit.QuantConfig(double_quant=request.param))


def test_looks_like_the_weight(module):
    view = module.weight
    assert isinstance(view, WeightView) and isinstance(view, torch.Tensor)
    assert (view.shape, view.dtype, view.device.type, view.requires_grad) == ((64, 96), torch.float32, "cpu", False)
    assert view.ndim == 2 and view.numel() == 64 * 96 and view.size(1) == 96
    assert "WeightView" in repr(view)


def test_reading_operations_see_the_dequantized_weight(module):
    w, view = module.dequantize(), module.weight
    other = torch.randn(64, 96)
    for result, want in [
        (view + other, w + other),
        (other - view, other - w),
        (view.T, w.T),
        (view[3], w[3]),
        (view.to(torch.float16), module.dequantize(torch.float16)),
        (view.float() + 0, w),
        (view.clone(), w),
        (view.data + 0, w),
        (view.data.clone(), w),
        (view.norm(), w.norm()),
        (torch.cat([view, other]), torch.cat([w, other])),
        (copy.deepcopy(view), w),
        (view.detach() * 2, w * 2),
        (torch.linalg.svdvals(view), torch.linalg.svdvals(w)),
    ]:
        assert type(result) is torch.Tensor
        torch.testing.assert_close(result, want)


WRITES = {
    "copy_": lambda m, w: m.weight.copy_(w),
    "data setter": lambda m, w: setattr(m.weight, "data", w),
    "data, then copy_": lambda m, w: m.weight.data.copy_(w),
    "assignment": lambda m, w: setattr(m, "weight", w),
    "parameter": lambda m, w: setattr(m, "weight", nn.Parameter(w)),
    "add_": lambda m, w: m.weight.add_(w - m.dequantize()),
    "augmented data": lambda m, w: _augment(m, w),
    "setitem": lambda m, w: m.weight.__setitem__(slice(None), w),
    "zero_ and copy_": lambda m, w: m.weight.zero_().copy_(w),
    "out=": lambda m, w: torch.add(w, 0.0, out=m.weight),
    "init": lambda m, w: (nn.init.zeros_(m.weight), m.weight.copy_(w)),
}


def _augment(module, w):
    module.weight.data += w - module.dequantize()


@pytest.mark.parametrize("how", WRITES)
def test_writing_operations_requantize(module, how):
    w = torch.randn(64, 96)
    with torch.no_grad():
        WRITES[how](module, w)
    packed, state = fourbit.quantize_4bit(w, double_quant=module.double_quant)
    # add_ and += round once more in float32, so compare values rather than bits
    torch.testing.assert_close(module.dequantize(), fourbit.dequantize_4bit(packed, state), rtol=0, atol=0.35)
    assert (module.dequantize() - w).abs().mean() < 0.1


def test_one_row_is_written_and_the_others_stay(module):
    before = module.dequantize()
    module.weight[5] = 2.0
    after = module.dequantize()
    torch.testing.assert_close(after[5], torch.full((96,), 2.0), rtol=0.02, atol=0)
    far = torch.cat([before[:4] - after[:4], before[8:] - after[8:]])
    assert far.abs().max() < (0.01 if module.double_quant else 1e-6)


def test_a_write_of_nan_or_of_another_shape_is_refused(module):
    before = module.dequantize()
    with pytest.raises(fourbit.NonFiniteError):
        module.weight.data = torch.full((64, 96), torch.nan)
    with pytest.raises(ValueError, match="want shape"):
        module.weight = torch.randn(3, 3)
    with pytest.raises(TypeError, match="must be a tensor"):
        module.weight = None
    assert torch.equal(before, module.dequantize())


def test_products_run_on_the_packed_weight(module, monkeypatch):
    w = module.dequantize()
    x, y = torch.randn(5, 96, requires_grad=True), torch.randn(5, 64, requires_grad=True)
    want = functional.linear(x, w, module.bias), y @ w, torch.matmul(y, w)
    monkeypatch.setattr(WeightView, "read", lambda *a: pytest.fail("dequantized"))
    got = functional.linear(x, module.weight, module.bias), y @ module.weight, torch.matmul(y, module.weight)
    for result, expected in zip(got, want, strict=True):
        torch.testing.assert_close(result, expected)
    grads = torch.autograd.grad(got[0].square().sum() + got[1].square().sum(), (x, y))
    want_grads = torch.autograd.grad(want[0].square().sum() + want[1].square().sum(), (x, y))
    for result, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(result, expected)


def test_it_keeps_up_with_the_module(module):
    view = module.weight
    module.store(torch.ones(64, 96))
    torch.testing.assert_close(view + 0, torch.ones(64, 96), rtol=0.01, atol=0)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(4, 32, 64), (3, 5, 7)], ids=["aligned", "ragged"])
def test_expert_views(shape, double_quant):
    torch.manual_seed(0)
    w = torch.randn(shape)
    experts = ExpertWeights4bit.from_parameter(w, fourbit.QuantConfig(double_quant=double_quant))
    whole = experts.dequantize()
    assert len(experts) == shape[0]
    x, y = torch.randn(6, shape[2], requires_grad=True), torch.randn(6, shape[1])
    for index in (0, 2, -1, torch.tensor(1)):
        part = experts[index]
        assert part.shape == shape[1:]
        torch.testing.assert_close(part + 0, whole[index], rtol=0, atol=0)
        torch.testing.assert_close(functional.linear(x, part), x @ whole[index].T)
        torch.testing.assert_close(y @ part, y @ whole[index])
    functional.linear(x, experts[1]).sum().backward()
    torch.testing.assert_close(x.grad, whole[1].sum(0).expand_as(x))
    with pytest.raises(IndexError, match="expert 9"):
        experts[9]
    # where the parameter stood: tensor attributes and torch functions on the module itself
    assert experts.shape == shape and experts.dtype == torch.float32
    torch.testing.assert_close(torch.bmm(torch.ones(shape[0], 1, shape[1]), experts), whole.sum(1, keepdim=True))
    assert torch.equal(experts[torch.tensor([1, 0])], whole[[1, 0]])


def test_writing_one_expert_leaves_the_others():
    torch.manual_seed(0)
    experts = ExpertWeights4bit.from_parameter(torch.randn(4, 32, 64))
    w = torch.randn(4, 32, 64)
    experts.data = w
    assert torch.equal(experts.dequantize(), ExpertWeights4bit.from_parameter(w).dequantize())
    before = experts.dequantize()
    experts.data *= 2
    assert torch.equal(experts.dequantize(), before * 2) and "data" not in experts.__dict__
    before = experts.dequantize()
    with torch.no_grad():
        experts[2].fill_(3.0)
    after = experts.dequantize()
    assert torch.equal(after[2], torch.full((32, 64), 3.0))
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])
