"""torch's ColwiseParallel and RowwiseParallel on 4-bit layers, over gloo processes on this machine."""

import copy

import pytest
import torch
from torch import nn

import fourbit
from fourbit.nn import Embedding4bit
from tests.processes import spawn

CASES = {
    # hidden, inner, blocksize, double_quant: what crosses a border of two or four processes
    "nothing": (128, 256, 32, False),
    "nested groups": (64, 256, 32, True),
    "blocks": (96, 192, 64, False),
    "blocks and nested groups": (192, 320, 128, True),
    "odd": (33, 65, 64, True),
    "fewer rows than processes": (3, 3, 32, False),
}


class Gated(nn.Module):
    """A Llama's MLP, with biases."""

    def __init__(self, hidden, inner):
        super().__init__()
        self.gate = nn.Linear(hidden, inner)
        self.up = nn.Linear(hidden, inner)
        self.down = nn.Linear(inner, hidden)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def build(hidden, inner, blocksize, double_quant, device="cpu"):
    torch.manual_seed(0)
    config = fourbit.QuantConfig(blocksize=blocksize, double_quant=double_quant)
    return fourbit.quantize_model(Gated(hidden, inner), config).to(device)


def step(model, x):
    """The result, and the gradients to x and the biases."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(grads) == 3
    return y.detach(), x.grad, {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}


def divide(model, mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    # of uneven parts as ordinary tensors torch does not know how large the whole is, whatever the layer
    local = model.gate.out_features % mesh.size() == 0
    styles = {name: ColwiseParallel(use_local_output=local) for name in ("gate", "up")}
    return parallelize_module(model, mesh, {**styles, "down": RowwiseParallel()})


def full(model):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def same(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


def run_mlp(rank, count, cases, folder, device):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device, (count,))
    for name, (hidden, inner, *how) in cases.items():
        whole = build(hidden, inner, *how, device)
        divided = divide(copy.deepcopy(whole), mesh)
        x = torch.randn(5, hidden).to(device)
        want, got = step(whole, x), step(divided, x)
        near = {"rtol": 1e-3, "atol": 1e-3} if device == "cuda" else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(got, want, **near, msg=lambda text, name=name: f"{name}: {text}")
        reference = whole.state_dict()
        if rank == 0:
            same(full(divided), reference)
        else:
            full(divided)
        # the weight as others read it is the whole, on each
        assert torch.equal(divided.down.weight.clone(), whole.down.weight.clone())
        assert torch.equal(copy.deepcopy(divided).up.dequantize(), whole.up.dequantize())
        # another weight, loaded and stored, reaches what is derived
        other = build(hidden, inner, *how, device)
        for layer in (other.gate, other.up, other.down):
            layer.store(0.1 * torch.randn(layer.weight_shape).to(device))
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(divided, other.state_dict(), options=options)
        torch.testing.assert_close(divided(x), other(x), **near)
        divided.gate.store(whole.gate.dequantize())
        other.gate.store(whole.gate.dequantize())
        torch.testing.assert_close(divided(x), other(x), **near)
        # a distributed checkpoint, which each process writes its part of
        dcp.save(get_model_state_dict(divided), checkpoint_id=f"{folder}/{name}")
        again = divide(build(hidden, inner, *how, device), mesh)
        state = get_model_state_dict(again)
        dcp.load(state, checkpoint_id=f"{folder}/{name}")
        set_model_state_dict(again, state)
        torch.testing.assert_close(again(x), other(x), **near)


def run_words(rank, count):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (count,))
    model = divide(build(192, 320, 128, True), mesh)
    found = fourbit.explain(model.down)
    assert found.query.blocksize == 32 and not found.query.nested
    assert f"columns {160 * rank} to {160 * rank + 160} of 320, part {rank + 1} of 2" in str(found)
    assert "a border runs through blocks of 128: here they are of 32" in found.part
    assert "scales decoded to float32, as a border runs through groups of 256 of them" in found.part
    assert found.to_dict()["part"] == found.part
    with pytest.raises(TypeError, match="x is an ordinary tensor"):
        model.down.forward(torch.randn(2, 320))
    with pytest.raises(TypeError, match="cannot be pickled"):
        copy.copy(model.down.split).__getstate__()
    embedding = nn.Sequential(Embedding4bit(64, 64))
    with pytest.raises(NotImplementedError, match="Embedding4bit cannot be divided over processes"):
        parallelize_module(embedding, mesh, {"0": ColwiseParallel()})


def run_ops(rank, count):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    from fourbit.nn import strategies  # noqa: F401

    mesh = init_device_mesh("cpu", (count,))
    layer = build(64, 128, 32, False).up
    weight = layer.packed_weight()
    x = torch.randn(4, 64)

    def at(tensor, placement):
        return distribute_tensor(tensor, mesh, [placement])

    code = at(weight.code, Replicate())
    want = torch.ops.fourbit.linear_4bit(x, *weight[:4], 128)
    grad = torch.ops.fourbit.linear_4bit_grad(want, *weight[:4], 64)
    for of_x, of_weight, of_y in (
        (Replicate(), Replicate(), Replicate()),
        (Shard(0), Replicate(), Shard(0)),
        (Shard(1), Shard(1), Partial()),
        (Replicate(), Shard(0), None),  # gathered
    ):
        packed, absmax = at(weight.packed, of_weight), at(weight.absmax, of_weight)
        y = torch.ops.fourbit.linear_4bit(at(x, of_x), packed, absmax, code, 32, 128)
        assert of_y is None or y.placements == (of_y,)
        torch.testing.assert_close(y.full_tensor(), want)
    packed, absmax = at(weight.packed, Shard(0)), at(weight.absmax, Shard(0))
    y = torch.ops.fourbit.linear_4bit_grad(at(want, Shard(1)), packed, absmax, code, 32, 64)
    assert y.placements == (Partial(),)
    torch.testing.assert_close(y.full_tensor(), grad)
    dense = torch.ops.fourbit.dequantize_4bit(packed, absmax, code, 32, [128, 64], torch.float32)
    assert torch.equal(dense.full_tensor(), layer.dequantize())
    ids = at(torch.tensor([[5, 1], [0, 127]]), Shard(0))
    rows = torch.ops.fourbit.embedding_4bit(ids, packed, absmax, code, 32, 128, 64, torch.float32)
    assert rows.placements == (Shard(0),)
    assert torch.equal(rows.full_tensor(), layer.dequantize()[ids.full_tensor()])


@pytest.mark.parametrize("count", (2, pytest.param(4, marks=pytest.mark.long)))
def test_mlp(count, tmp_path):
    spawn(run_mlp, count, CASES, str(tmp_path), "cpu", count=count)


@pytest.mark.parametrize("count", (2, 4))
def test_mlp_on_gpus(count, tmp_path):
    spawn(run_mlp, count, CASES, str(tmp_path), "cuda", count=count, device="cuda")


@pytest.mark.long
def test_ops_on_dtensors():
    spawn(run_ops, 2)


@pytest.mark.long
def test_explained_and_refused():
    spawn(run_words, 2)
