"""QuantState on the backend's device: copies, pickles, files and moves keep every bit and go on working."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch

import fourbit
from fourbit.state import QuantState
from fourbit.testing.inputs import normal
from fourbit.testing.oracle import assert_same_bits

COVERS = ()

TENSORS = ("absmax", "code", "nested_absmax", "nested_code", "nested_offset")
PLAIN = ("shape", "blocksize", "quant_type", "dtype", "device")


def _through_a_file(value: object) -> object:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _through_a_state_dict(value: tuple[torch.Tensor, QuantState]) -> tuple[torch.Tensor, QuantState]:
    packed, state = value
    return packed, QuantState.from_state_dict(state.to_state_dict("layer.weight."), "layer.weight.")


COPIES: dict[str, Callable] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": _through_a_file,
    "state dict": _through_a_state_dict,
    "to the CPU and back": lambda value: (value[0], value[1].to("cpu").to(value[1].device)),
}


@pytest.mark.parametrize("double_quant", (False, True), ids=("plain", "double"))
@pytest.mark.parametrize("name", COPIES)
def test_copies(need, device, name, double_quant):
    need("quantize_4bit", torch.bfloat16)
    need("quantize_blockwise")
    need("dequantize_4bit", torch.bfloat16, double_quant=double_quant)
    w = normal(30, 50).to(device, torch.bfloat16)
    packed, state = fourbit.quantize_4bit(w, blocksize=64, double_quant=double_quant)
    before = fourbit.dequantize_4bit(packed, state).cpu()
    packed_copy, state_copy = COPIES[name]((packed, state))
    for field in PLAIN:
        assert getattr(state_copy, field) == getattr(state, field), field
    for field in TENSORS:
        left, right = getattr(state_copy, field), getattr(state, field)
        assert (left is None) == (right is None), field
        if right is not None:
            assert left.device == right.device
            assert_same_bits(left, right.cpu(), field)
    assert_same_bits(fourbit.dequantize_4bit(packed_copy, state_copy), before, "dequantized from the copy")


def test_deepcopy_shares_nothing(need, device):
    need("quantize_4bit")
    need("dequantize_4bit")
    packed, state = fourbit.quantize_4bit(normal(10, 64).to(device), blocksize=64)
    twin = copy.deepcopy(state)
    before = fourbit.dequantize_4bit(packed, state)
    twin.absmax.zero_()
    assert_same_bits(fourbit.dequantize_4bit(packed, state), before.cpu(), "the original")


def test_state_describes_the_weight(need, device):
    need("quantize_4bit", torch.float16)
    packed, state = fourbit.quantize_4bit(normal(9, 7, 5).to(device, torch.float16), quant_type="fp4", blocksize=128)
    assert (state.shape, state.numel, state.quant_type) == ((9, 7, 5), 315, "fp4")
    assert (state.dtype, state.blocksize, state.double_quant) == (torch.float16, 128, False)
    assert state.device == device == packed.device
    assert packed.shape == (158, 1) and state.absmax.shape == (3,)
    assert state.nbytes == 158 + 3 * 4


def test_default_blocksize_is_the_backends(need, device, backend):
    size = backend.default_blocksize(device)
    need("quantize_4bit", blocksize=size)
    _, state = fourbit.quantize_4bit(normal(10, 64).to(device))
    assert state.blocksize == size
