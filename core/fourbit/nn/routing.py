"""Tokens to their experts and back: rows sorted as grouped products want them, and each token's results summed up."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routed(NamedTuple):
    """Rows, one for each expert that a token chose, sorted by expert. Nothing of it depends on values on the host.

    `experts`: of each row, rising; `order`: which row each was before; `offsets`: int32 [count], where the rows of each
    of the first `count` experts end.
    """

    experts: Tensor
    order: Tensor
    offsets: Tensor

    def summed(self, y: Tensor, k: int) -> Tensor:
        """[T, width], the sum of each token's `k` rows of y [T k, width]."""
        back = torch.empty_like(self.order).scatter_(0, self.order, torch.arange(len(y), device=self.order.device))
        # gathered and summed, not added by index: that has no fixed order on GPUs
        return y[back].view(-1, k, y.shape[-1]).sum(1)


def by_expert(chosen: Tensor, count: int) -> Routed:
    """`chosen` [T, k]: numbers of experts, of which those from `count` on are nobody's."""
    experts, order = torch.sort(chosen.reshape(-1), stable=True)
    numbers = torch.arange(count, device=experts.device, dtype=experts.dtype)
    return Routed(experts, order, torch.searchsorted(experts, numbers, right=True, out_int32=True))
