"""torch's current stream and device are respected on every call, from any thread."""

from __future__ import annotations

import threading

import pytest
import torch

import fourbit
from fourbit.testing.oracle import assert_same_bits, make_weight

SPIN = 200_000_000  # clock cycles: about 0.1 s


def test_work_is_queued_on_the_current_stream(device):
    """The kernel runs after what its stream was given before, and not before it."""
    weight = make_weight(256, 256)
    packed, state = weight.packed.to(device), weight.state(device)
    late = torch.zeros_like(packed)
    fourbit.dequantize_4bit(late, state)  # loaded now, so that what follows is only a launch
    stream = torch.cuda.Stream(device)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SPIN)
        late.copy_(packed)  # would come too late for a kernel on another stream
        out = fourbit.dequantize_4bit(late, state)
    stream.synchronize()
    assert_same_bits(out, weight.dense(), "a result that was queued behind a long kernel")


def test_two_streams(device):
    weight = make_weight(128, 192)
    packed, state = weight.packed.to(device), weight.state(device)
    torch.cuda.synchronize(device)
    results = []
    for _ in range(4):
        with torch.cuda.stream(torch.cuda.Stream(device)):
            results += [fourbit.dequantize_4bit(packed, state) for _ in range(8)]
    torch.cuda.synchronize(device)
    for out in results:
        assert_same_bits(out, weight.dense(), "one of many streams")


def test_new_threads(device):
    """A thread in which torch has not touched the device yet; and many at once."""
    weight = make_weight(200, 96)
    packed, state = weight.packed.to(device), weight.state(device)
    torch.cuda.synchronize(device)
    results, errors = [], []

    def work():
        try:
            for _ in range(50):
                results.append(fourbit.dequantize_4bit(packed, state))
            torch.cuda.current_stream(device).synchronize()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(results) == 400
    for out in results[::17]:
        assert_same_bits(out, weight.dense(), "a thread's result")


def test_another_gpu_than_the_current_one(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    weight = make_weight(64, 320, double_quant=True)
    second = torch.device("cuda", 1)
    with torch.cuda.device(0):
        for where in (second, device, second):
            out = fourbit.dequantize_4bit(weight.packed.to(where), weight.state(where))
            assert out.device == where and torch.cuda.current_device() == 0
            assert_same_bits(out, weight.dense(), str(where))
            packed, state = fourbit.quantize_4bit(weight.dense().to(where))
            assert packed.device == where and state.absmax.device == where
