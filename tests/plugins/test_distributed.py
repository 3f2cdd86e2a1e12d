"""FSDP2, DDP and distributed checkpoints over two gloo processes on this machine."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

import fourbit
from tests.processes import spawn

ROWS = 96, 129
"""The second does not divide by the number of processes."""


class Adapted(nn.Module):
    """A frozen 4-bit layer with a trained adapter beside it, twice."""

    def __init__(self, rows):
        super().__init__()
        self.base = nn.Linear(64, rows)
        self.down = nn.Linear(64, 8, bias=False)
        self.up = nn.Linear(8, rows, bias=False)
        self.out = nn.Linear(rows, 64)

    def forward(self, x):
        return self.out(torch.relu(self.base(x) + self.up(self.down(x))))


def build(rows, double_quant):
    torch.manual_seed(0)
    config = fourbit.QuantConfig(double_quant=double_quant, skip_modules=["down", "up"])
    return fourbit.quantize_model(Adapted(rows), config)


def train(model, steps=3):
    torch.manual_seed(7)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x, y = torch.randn(8, 64), torch.randn(8, 64)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return model(x).detach()


def run_fsdp(rank, rows, double_quant, folder):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plain = build(rows, double_quant)
    want = train(copy.deepcopy(plain))
    sharded = build(rows, double_quant)
    fully_shard(sharded)
    got = train(sharded)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_model_state_dict(sharded, options=options)
    if rank == 0:
        reference = plain.state_dict()
        for name in ("base.qweight", "base.scales", "base.codebook", "out.qweight", "out.scales"):
            assert torch.equal(full[name], reference[name]), name
    # broadcast load: rank 0 alone has the values
    empty = build(rows, double_quant)
    for p in empty.parameters():
        p.data.zero_()
    fully_shard(empty)
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(empty, full if rank == 0 else {}, options=broadcast)
    x = torch.randn(4, 64)
    torch.testing.assert_close(empty(x), sharded(x))
    # mixed precision casts floating-point parameters alone: the integers keep their bits
    mixed = build(rows, double_quant)
    fully_shard(mixed, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    half = copy.deepcopy(plain).bfloat16()
    torch.testing.assert_close(mixed(x).float(), half(x.bfloat16()).float(), rtol=2e-2, atol=2e-2)
    # distributed checkpoint
    import torch.distributed.checkpoint as dcp

    dcp.save(get_model_state_dict(sharded), checkpoint_id=folder)
    other = build(rows, double_quant)
    for p in other.parameters():
        p.data.zero_()
    fully_shard(other)
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state)
    torch.testing.assert_close(other(x), sharded(x))


def run_ddp(rank, rows, double_quant, folder):
    model = build(rows, double_quant)
    want = train(copy.deepcopy(model))
    torch.testing.assert_close(train(nn.parallel.DistributedDataParallel(model)), want, rtol=1e-4, atol=1e-4)


def case(rows, double_quant):
    """All but one are long: CI runs that one with the oldest torch, too, which takes integers less willingly."""
    marks = () if double_quant and rows == ROWS[1] else pytest.mark.long
    return pytest.param(rows, double_quant, marks=marks, id=f"{double_quant}-{rows}")


@pytest.mark.parametrize(("rows", "double_quant"), [case(*pair) for pair in product(ROWS, (False, True))])
def test_fsdp2(rows, double_quant, tmp_path):
    spawn(run_fsdp, rows, double_quant, str(tmp_path / "dcp"))


@pytest.mark.long
def test_ddp(tmp_path):
    spawn(run_ddp, 96, True, str(tmp_path))
