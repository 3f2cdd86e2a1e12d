"""The Weight that is kept with a layer's codes: never that of other bits, and no memory beyond the layer's own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import fourbit
from fourbit.nn.prepared import prepared

OUT, IN = 8, 64
nested = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
X = torch.randn(3, IN, generator=torch.Generator().manual_seed(1))


def layer(nested=False, seed=0, shape=(OUT, IN), dtype=torch.float32):
    torch.manual_seed(seed)
    config = fourbit.QuantConfig(blocksize=32, double_quant=nested)
    return fourbit.nn.Linear4bit.from_linear(nn.Linear(*reversed(shape), bias=False, dtype=dtype), config)


def want(module, x=X):
    """The product by the op, of the module's tensors as they are."""
    packed, state = module.quant_state()
    return fourbit.linear_4bit(x, packed, state)


def parts(module):
    return [tensor for tensor in (*module.parameters(), *module.buffers())]


def assert_right(module, x=X):
    for _ in range(2):
        assert torch.equal(module(x), want(module, x))


@nested
def test_it_is_kept(nested):
    module = layer(nested)
    first = prepared(module)
    assert first is not None and prepared(module) is first
    module(X)
    assert prepared(module) is first
    for part, other in zip(first, module.packed_weight(), strict=True):
        assert part == other if not isinstance(part, torch.Tensor) else torch.equal(part, other)


def other_data(module, other):
    for mine, its in zip(parts(module), parts(other), strict=True):
        mine.data = its.data.clone()


def other_scales(module, other):
    module.scales.data = other.scales.data.clone()


def set_in_place(module, other):
    for mine, its in zip(parts(module), parts(other), strict=True):
        mine.set_(its.data.clone())


def unseen(module, other):
    """As what runs with torch's own functions alone does: nobody is told."""
    with torch._C.DisableTorchFunctionSubclass():
        other_data(module, other)


def swapped(module, other):
    for mine, its in zip(parts(module), parts(other), strict=True):
        torch.utils.swap_tensors(mine, its)


def new_parameters(module, other):
    module.qweight, module.scales = other.qweight, other.scales
    for name in module._buffers:
        setattr(module, name, getattr(other, name))


def in_the_dicts(module, other):
    module._parameters.update(other._parameters)
    module._buffers.update(other._buffers)


CHANGES = {
    "store": lambda module, other: module.store(other.dequantize()),
    "load_state_dict": lambda module, other: module.load_state_dict(other.state_dict()),
    "load_state_dict, assign": lambda module, other: module.load_state_dict(other.state_dict(), assign=True),
    ".data": other_data,
    ".data of the scales": other_scales,
    "set_": set_in_place,
    "unseen": unseen,
    "swap_tensors": swapped,
    "new parameters": new_parameters,
    "in the dicts": in_the_dicts,
    "memory given back and taken anew": lambda module, other: resized(module),
}


def resized(module):
    """As FSDP2 between two uses of a layer."""
    for tensor in parts(module):
        with torch._C.DisableTorchFunctionSubclass():
            storage, copied = tensor.untyped_storage(), tensor.detach().clone()
            size = storage.nbytes()
            storage.resize_(0)
            storage.resize_(size)
            tensor.detach().copy_(copied)


@nested
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weight_is_seen(nested, change):
    module, other = layer(nested), layer(nested, seed=1)
    before = module(X)
    CHANGES[change](module, other)
    assert_right(module)
    assert torch.equal(module(X), before) == change.startswith("memory")


@pytest.mark.parametrize("name", ["nested_scales", "nested_codebook", "nested_offset"])
def test_one_other_buffer_is_seen(name):
    module, other = layer(nested=True), layer(nested=True, seed=1)
    before = module(X)
    module._buffers[name] = getattr(other, name)
    assert_right(module)
    if name != "nested_codebook":  # which all layers have alike
        assert not torch.equal(module(X), before)


@nested
def test_moves_and_copies(nested):
    module = layer(nested)
    y = module(X)
    for moved in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module)):
        assert torch.equal(moved(X), y)
        moved.half()
        assert_right(moved)
    assert torch.equal(module.double()(X), y)  # which leaves the bits alone
    module.to("meta")
    assert module(X.to("meta")).is_meta
    with pytest.raises(ValueError, match="is on"):
        module(X)


@nested
@pytest.mark.parametrize("leave", [other_data, in_the_dicts, lambda module, _: module.to("meta")])
def test_memory_that_the_layer_gives_up_is_free(nested, leave):
    module, other = layer(nested), layer(nested, seed=1)
    module(X)
    held = [StorageWeakRef(tensor.untyped_storage()) for tensor in parts(module)]
    assert not any(ref.expired() for ref in held)
    leave(module, other)
    if leave is not in_the_dicts:
        del other
    assert all(ref.expired() for ref in held)


@nested
def test_a_layer_that_is_gone_is_gone(nested):
    """What is kept with a tensor refers to none that refers to it, so that no collector is needed."""
    module = layer(nested)
    module(X.clone().requires_grad_()).sum().backward()
    held = [StorageWeakRef(tensor.untyped_storage()) for tensor in parts(module)]
    del module
    assert all(ref.expired() for ref in held)


@nested
def test_graphs_keep_what_they_save_until_backward_alone(nested):
    module = layer(nested)
    y = module(X.clone().requires_grad_()).sum()
    held = [StorageWeakRef(tensor.untyped_storage()) for tensor in parts(module)]
    del module
    assert not any(ref.expired() for ref in held)
    y.backward()
    assert all(ref.expired() for ref in held)


@nested
def test_first_used_in_inference_mode(nested):
    module = layer(nested)
    with torch.inference_mode():
        module(X)
    x = X.clone().requires_grad_()
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.dequantize().sum(0).expand_as(X))


def test_made_in_inference_mode():
    with torch.inference_mode():
        module = layer()
        assert_right(module)
    with torch.no_grad():
        assert_right(module)
    with pytest.raises(RuntimeError, match="[Ii]nference"):  # as of any module
        module(X.clone().requires_grad_())


@nested
def test_a_function_of_another_layers_tensors(nested):
    module, other, longer = layer(nested), layer(nested, seed=1), layer(nested, shape=(OUT * 4, IN))
    for each in (module, other, longer):
        each(X)
    call = torch.func.functional_call
    assert torch.equal(call(module, dict(other.named_parameters()) | dict(other.named_buffers()), (X,)), want(other))
    assert torch.equal(call(module, {"qweight": other.qweight.detach()}, (X,)), want_of(module, other))
    assert_right(module)
    for mine, its in ((module, longer), (longer, module)):
        with pytest.raises(ValueError, match="packed must be uint8"):
            call(mine, dict(its.named_parameters()) | dict(its.named_buffers()), (X,))


def want_of(module, other):
    """Of one layer's codes and another's scales."""
    _, state = module.quant_state()
    return fourbit.linear_4bit(X, other.packed_weight().packed, state)


def test_layers_that_share_a_weight():
    module, other = layer(), layer(seed=1)
    other.qweight, other.scales = module.qweight, module.scales  # and a codebook of its own
    for _ in range(2):
        assert torch.equal(module(X), other(X))
    assert_right(module)
    assert_right(other)


@nested
@pytest.mark.parametrize("part", ["scales", "codebook"])
def test_a_part_of_a_part_is_no_part(nested, part):
    """At the same address, as shards are."""
    module = layer(nested)
    module(X)
    tensors = module._parameters if part in module._parameters else module._buffers
    tensors[part] = tensors[part][:2]
    with pytest.raises(ValueError, match="absmax" if part == "scales" else "code must be"):
        module(X)


@nested
def test_what_is_no_weight_is_not_kept(nested):
    module = layer(nested)
    with torch._C.DisableTorchFunctionSubclass():
        module.qweight.data = module.qweight.data[:-1]
    assert prepared(module) is None
    with pytest.raises(ValueError, match="linear_4bit: packed must be uint8"):
        module(X)
    module = layer(nested)
    module._parameters["qweight"] = nn.Parameter(module.qweight.detach().as_subclass(torch.Tensor), requires_grad=False)
    assert prepared(module) is None  # a stranger's parameter
    assert_right(module)
