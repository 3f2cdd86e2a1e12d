"""What launches without a driver."""

from __future__ import annotations

import pytest
import torch

from fourbit_cuda import driver, linear, tensor_map
from fourbit_gpu.spec import KernelSpec
from tests.cuda.standin import Driver, MadeUp


@pytest.fixture
def made_up(monkeypatch):
    """A Driver with a launcher and a kernel of that."""
    monkeypatch.setattr(driver, "_raw_stream", lambda index: 0x5EED + index)
    monkeypatch.setattr(driver, "describe_error", lambda code: f"error {code}")
    monkeypatch.setattr(linear, "_empty", lambda size, strides, dtype: torch.empty_strided(size, strides, dtype=dtype))
    monkeypatch.setattr(linear, "_ready", {})
    found = Driver()
    found.launcher = MadeUp(lambda *args: found.launch(*args))
    found.kernel = found.launcher.kernel(KernelSpec("a.cu", "a_kernel"))
    yield found
    tensor_map.tensor_map.cache_clear()
