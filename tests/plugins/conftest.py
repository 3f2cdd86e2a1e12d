"""The tests of plugins compute on the CPU, also where there is an accelerator, but where they say otherwise."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _models_go_to_the_cpu(monkeypatch):
    """from_pretrained with a quantizer takes the accelerator where no device_map is given; inputs are on the CPU."""
    if not torch.accelerator.is_available():
        return
    try:
        from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

        from fourbit_transformers import FourbitQuantizer
    except ImportError:
        return
    for kind in (FourbitQuantizer, Bnb4BitHfQuantizer):
        monkeypatch.setattr(kind, "update_device_map", lambda self, device_map: device_map or {"": "cpu"})
