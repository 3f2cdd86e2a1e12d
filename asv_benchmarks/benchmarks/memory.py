"""Peak memory of quantizing: the difference of the two is what it takes beyond torch and the weight itself."""

from __future__ import annotations

import torch

import fourbit


class Memory:
    """A float32 weight of 64 MiB."""

    def setup(self):
        # the first call loads the plugins; small, so that its own peak does not count
        fourbit.quantize_4bit(torch.zeros(64), blocksize=64)
        self.weight = torch.zeros(4096, 4096).normal_(generator=torch.Generator().manual_seed(0))

    def peakmem_weight_alone(self):
        return self.weight

    def peakmem_quantize(self):
        return fourbit.quantize_4bit(self.weight, blocksize=64)

    def peakmem_quantize_double(self):
        return fourbit.quantize_4bit(self.weight, blocksize=64, double_quant=True)
