"""Tests on a GPU: skipped where there is none, unless FOURBIT_REQUIRE_DEVICE=1.

FOURBIT_TEST_DEVICE names another backend than "cuda".
"""

from __future__ import annotations

import os

import pytest
import torch

import fourbit
from tests.support import skip_without_device

BACKEND = os.environ.get("FOURBIT_TEST_DEVICE", "cuda")


@pytest.fixture(scope="session")
def device():
    """The first GPU."""
    info = next((info for info in fourbit.backends() if info.name == BACKEND), None)
    if info is None or info.state != "ready":
        skip_without_device(f"backend {BACKEND} is {'not there' if info is None else f'{info.state}: {info.reason}'}")
    return torch.device("cuda", 0)


@pytest.fixture
def layer(device):
    """A Linear4bit in bfloat16, and the dense weight that it stands for."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 384, dtype=torch.bfloat16, device=device)
    return fourbit.nn.Linear4bit.from_linear(linear)
