"""nn.DataParallel, which transformers' Trainer wraps a model in on a machine with several GPUs."""

import copy
import sys

import pytest
import torch
from torch import nn

import fourbit
from fourbit.nn import Embedding4bit


class Model(nn.Module):
    def __init__(self, double_quant):
        super().__init__()
        torch.manual_seed(0)
        config = fourbit.QuantConfig(blocksize=64, double_quant=double_quant)
        self.table = Embedding4bit.from_embedding(nn.Embedding(20, 64), config)
        layers = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64, bias=False))
        self.layers = fourbit.quantize_model(layers, config)

    def forward(self, ids):
        return self.layers(self.table(ids))


@pytest.fixture
def devices(monkeypatch):
    """Two GPUs, or what stands for them: torch copies to GPUs alone."""
    if torch.cuda.device_count() > 1:
        return [torch.device("cuda", 0), torch.device("cuda", 1)]
    replicate = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, optional: device)
    copies = lambda tensors, devices, detach=False: [[tensor.clone() for tensor in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)
    return [torch.device("cpu")] * 2


@pytest.mark.parametrize("double_quant", (False, True))
def test_replicas(double_quant, devices):
    model = Model(double_quant).to(devices[0])
    ids = torch.arange(6, device=devices[0]).reshape(2, 3)
    alone = copy.deepcopy(model)
    want = alone(ids)
    want.square().mean().backward()
    for _ in range(2):  # the second time the layers hold what they have prepared
        model.zero_grad()
        replicas = nn.parallel.replicate(model, devices)
        parts = [replica(part.to(device)) for replica, part, device in zip(replicas, ids, devices, strict=True)]
        found = torch.stack([part.to(devices[0]) for part in parts])
        torch.testing.assert_close(found, want)
        found.square().mean().backward()
        torch.testing.assert_close(model.layers[0].bias.grad, alone.layers[0].bias.grad)
    assert all(not tensor.requires_grad for name, tensor in model.named_parameters() if "bias" not in name)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    for replica, device in zip(replicas, devices, strict=True):
        assert replica.layers[0].weight.device == device
        assert torch.equal(replica.layers[0].dequantize().to(devices[0]), model.layers[0].dequantize())
