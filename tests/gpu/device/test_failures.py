"""What goes wrong leaves the process usable where CUDA allows it."""

from __future__ import annotations

import pytest
import torch

import fourbit
from fourbit.testing.oracle import assert_same_bits, make_weight


def test_out_of_memory(device):
    weight = make_weight(64, 64)
    packed, state = weight.packed.to(device), weight.state(device)
    rows = 1 << 24
    most = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved(device) + 2**28) / most), device)
    try:
        with pytest.raises(torch.OutOfMemoryError):  # 2 GB of rows, from a weight of a few kilobytes
            fourbit.embedding_4bit(torch.zeros(rows, dtype=torch.int32, device=device), packed, state, torch.bfloat16)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()
    assert_same_bits(fourbit.dequantize_4bit(packed, state), weight.dense(), "after running out of memory")


def test_a_launch_that_the_driver_refuses(device):
    from fourbit_cuda.driver import launcher
    from fourbit_gpu.elementwise import dequantize_spec
    from fourbit_gpu.launcher import LaunchError

    weight = make_weight(64, 64)
    packed, state = weight.packed.to(device), weight.state(device)
    kernel = launcher(device.index).kernel(dequantize_spec(torch.float32, False))
    with pytest.raises(LaunchError, match=r"dequantize_4bit\[.*4096 threads.*CUDA_ERROR_INVALID_VALUE"):
        kernel.launch((1, 1, 1), 4096, 0, (0,) * 10)
    assert_same_bits(fourbit.dequantize_4bit(packed, state), weight.dense(), "after a refused launch")


def test_too_much_shared_memory_is_refused_when_loading(device):
    from fourbit_cuda.driver import launcher
    from fourbit_gpu.elementwise import dequantize_spec
    from fourbit_gpu.launcher import LaunchError

    with pytest.raises(LaunchError, match="9999999 bytes of dynamic shared memory"):
        launcher(device.index).kernel(dequantize_spec(torch.float32, False), 9_999_999)
