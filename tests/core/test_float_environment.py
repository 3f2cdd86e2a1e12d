"""Same input, same bits, whatever floating-point environment the caller's thread has."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fourbit
from fourbit import float_environment, scales
from fourbit.backend import OPS
from fourbit.testing.inputs import normal
from fourbit.weight import Weight
from tests.support import skip_or_fail

TINY = 2.0**-127
"""Times a normal number: some subnormal, some just above."""
SHAPES = ((1, 1024, 2048), (3, 1020, 1088), (5, 1020, 1100), (70, 516, 1030), (2, 64, 96))
"""Rows, out, in: streamed and decoded, ragged, shared among threads; the last on the calling thread alone."""


@contextmanager
def flush_denormal():
    if not torch.set_flush_denormal(True):
        skip_or_fail("this processor cannot flush subnormal numbers")
    try:
        assert float_environment.flushes()
        yield
    finally:
        torch.set_flush_denormal(False)
    assert not float_environment.flushes()


@contextmanager
def rounding_upward():
    mode = {"x86_64": 0x800, "amd64": 0x800, "aarch64": 0x400000, "arm64": 0x400000}.get(platform.machine().lower())
    try:
        fesetround = ctypes.CDLL(None).fesetround
    except (AttributeError, TypeError, OSError):
        mode = None
    if mode is None:
        skip_or_fail("how this system sets the rounding mode is not known")
    assert fesetround(mode) == 0
    try:
        yield
    finally:
        fesetround(0)


ENVIRONMENTS = {"flush": flush_denormal, "upward": rounding_upward}


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.ones(1 << 20).mul(2)  # torch's threads begin here, with the defaults
    yield
    torch.set_num_threads(before)


def calls(rows: int, n: int, k: int, dtype: torch.dtype) -> dict[str, tuple]:
    """A call of each op whose inputs, scales and results are in part subnormal."""
    packed, state = fourbit.quantize_4bit(normal(n, k) * TINY, blocksize=64)
    _, nested = fourbit.quantize_4bit(normal(n, k) * TINY, blocksize=64, double_quant=True)
    _, large = fourbit.quantize_4bit(normal(n, k), blocksize=64)
    tiny = (normal(rows, k) * TINY).to(dtype), (normal(rows, n) * TINY).to(dtype)
    weight, sized = (packed, state.absmax, state.code, 64), (packed, large.absmax, large.code, 64)
    eight = (packed, nested.absmax, nested.code, 64)
    scales = nested.nested_absmax, nested.nested_code, nested.nested_offset
    ends = torch.tensor([rows // 3, rows // 3, rows - rows // 4, rows])
    experts = (sized[0], sized[1], sized[2], 64)
    return {
        "quantize_4bit": ((normal(n, k) * TINY).to(dtype), state.code, 64, False),
        "quantize_4bit_scaled": ((normal(n, k) * TINY).to(dtype), state.code, 64, state.absmax),
        "dequantize_4bit": (*weight, [n, k], dtype),
        "linear_4bit": (tiny[0], *sized, n, None, None, None, (normal(n) * TINY).to(dtype)),
        "linear_4bit_grad": (tiny[1], *sized, k),
        "embedding_4bit": (torch.arange(n).flip(0), *eight, n, k, dtype, *scales),
        "grouped_linear_4bit": (tiny[0], ends, *experts, n // 4),
        "grouped_linear_4bit_grad": (tiny[1][:, : n // 4].contiguous(), ends, *experts, k),
        "quantize_blockwise": ((normal(n * k) * TINY).to(dtype), scales[1], 256),
        "dequantize_blockwise": (torch.arange(n * k).to(torch.uint8), torch.full((-(-n * k // 256),), TINY), scales[1])
        + (256, dtype),
        "double_quantize": (state.absmax, scales[1]),
    }


def bits(result) -> list[bytes]:
    return [leaf.reshape(-1).view(torch.uint8).numpy().tobytes() for leaf in tree_leaves(result)]


def check(environment, run, name: str) -> None:
    want = bits(run())
    for attempt in range(5):
        with ENVIRONMENTS[environment]():
            result = run()
        assert bits(result) == want, f"{name}, call {attempt + 1}"


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_kernels(shape, dtype, environment):
    (info,) = [info for info in fourbit.backends() if info.name == "cpu"]
    if info.state != "ready":
        skip_or_fail(f"backend cpu is {info.state}: {info.reason}")
    everything = calls(*shape, dtype)
    assert set(everything) == {*OPS, "double_quantize"}
    if environment == "upward":
        del everything["double_quantize"]  # in plain torch, which rounds as its threads are set to
        del everything["quantize_4bit_scaled"]
    with fourbit.use_backend("cpu"):
        for op, args in everything.items():
            check(environment, partial(getattr(torch.ops.fourbit, op), *args), op)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_reference(dtype):
    """What it computes itself. Its products are torch's own."""
    everything = calls(5, 1020, 1100, dtype)
    with fourbit.use_backend("reference"):
        for op, args in everything.items():
            if "linear" not in op:
                check("flush", partial(getattr(torch.ops.fourbit, op), *args), op)


def test_the_reference_decodes_the_same_weight_for_its_products():
    """Multiplied by numbers so large that neither products nor sums are subnormal: what is left is the decoding."""
    packed, state = fourbit.quantize_4bit(normal(1024, 2048) * TINY, blocksize=64)
    x = torch.full((2, 2048), 2.0**100)
    with fourbit.use_backend("reference"):
        want = fourbit.linear_4bit(x, packed, state)
        with flush_denormal():
            got = fourbit.linear_4bit(x, packed, state)
    torch.testing.assert_close(got, want)


def test_double_quantized_scales():
    values = (normal(1 << 17).abs() * TINY).contiguous()
    codes, nested_absmax, code, offset = torch.ops.fourbit.double_quantize(values, fourbit.codebooks.dynamic_map())
    check("flush", lambda: scales.decode(codes, nested_absmax, code, offset), "decode")
    packed = torch.zeros((1 << 17) * 32, dtype=torch.uint8)
    weight = Weight(packed, codes, fourbit.codebooks.get("nf4").tensor(), 64, nested_absmax, code, offset)
    check("flush", lambda: weight.expert(0, 64 << 17).absmax, "expert")


def test_the_setting_is_the_callers_again_afterwards():
    w = normal(1024, 1024) * TINY
    for backend in ("cpu", "reference"):
        with fourbit.use_backend(backend), flush_denormal():
            fourbit.quantize_4bit(w, double_quant=True)
            assert float_environment.flushes()
            with pytest.raises(IndexError):
                packed, state = fourbit.quantize_4bit(w)
                fourbit.embedding_4bit(torch.tensor([1024]), packed, state)
            assert float_environment.flushes()


def test_threads_that_began_while_the_caller_flushed():
    """They inherit the setting, and keep it when the caller has turned it off."""
    program = """
import torch, fourbit
from fourbit.testing.inputs import normal
w = normal(1024, 2048) * 2.0**-127
torch.set_num_threads(1)
want = fourbit.quantize_4bit(w)[1].absmax
torch.set_num_threads(2)
torch.set_flush_denormal(True)
torch.ones(1 << 20).mul(2)
torch.set_flush_denormal(False)
assert want.count_nonzero() and (want < 2.0**-126).any()
with fourbit.use_backend("cpu"):
    packed, state = fourbit.quantize_4bit(w)
    got = fourbit.dequantize_4bit(packed, state)
torch.set_num_threads(1)
with fourbit.use_backend("reference"):
    other, other_state = fourbit.quantize_4bit(w)
    assert torch.equal(packed, other)
    assert torch.equal(state.absmax.view(torch.int32), other_state.absmax.view(torch.int32))
    assert torch.equal(got.view(torch.int32), fourbit.dequantize_4bit(packed, other_state).view(torch.int32))
"""
    (info,) = [info for info in fourbit.backends() if info.name == "cpu"]
    if info.state != "ready":
        skip_or_fail(f"backend cpu is {info.state}: {info.reason}")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
