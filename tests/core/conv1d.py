"""A stand-in for transformers' Conv1D, for tests without transformers: core knows the class by its dotted name."""

from __future__ import annotations

import torch
from torch import nn


class Conv1D(nn.Module):
    """A linear layer that holds [in, out]; `nf` rows out, `nx` columns in."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"


def gpt2() -> nn.Module:
    """The layers of a GPT-2 block, by its names; c_proj is square."""
    torch.manual_seed(0)
    attention = nn.ModuleDict({"c_attn": Conv1D(192, 64), "c_proj": Conv1D(64, 64)})
    block = nn.ModuleDict({"attn": attention, "mlp": nn.ModuleDict({"c_fc": Conv1D(256, 64)})})
    return nn.ModuleDict({"wte": nn.Embedding(32, 64), "h": nn.ModuleList([block]), "action": nn.Linear(64, 32)})
