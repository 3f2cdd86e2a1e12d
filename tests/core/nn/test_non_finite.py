"""A weight with NaN or Inf is not stored, and the error names the place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fourbit
from fourbit.nn import Linear4bit
from tests.core.nn.frozen_model import DOUBLE_QUANT


@DOUBLE_QUANT
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", ((64, 48), (7, 33), (3, 5), (300, 512)))
@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
def test_wherever_it_is(shape, dtype, bad, double_quant):
    config = fourbit.QuantConfig(double_quant=double_quant)
    torch.manual_seed(0)
    layer = Linear4bit.from_linear(nn.Linear(*shape[::-1]).to(dtype), config)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    for row, column in ((0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 3)):
        weight = torch.randn(shape).to(dtype)
        weight[row, column] = bad
        with pytest.raises(fourbit.NonFiniteError, match=rf"up has a non-finite value .*\[{row}, {column}\]"):
            layer.store(weight, "up")
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


@DOUBLE_QUANT
@pytest.mark.parametrize("value", (0.0, 1e-45, 3e38))
def test_extreme_weights_are_finite(value, double_quant):
    layer = Linear4bit(64, 8, quant_type="nf4", double_quant=double_quant)
    layer.store(torch.full((8, 64), value))
