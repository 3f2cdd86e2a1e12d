"""What a backend says about itself: its name, what it supports, and errors where it declines."""

from __future__ import annotations

import re

import pytest
import torch

import fourbit
from fourbit import dispatch
from fourbit.backend import API_VERSION, OPS, Backend, OpQuery, Support
from fourbit.operations import OPERATIONS
from fourbit.testing.inputs import BLOCKSIZES, DTYPES, normal

COVERS = ()


def every_query(device: torch.device) -> list[OpQuery]:
    """One query for each op, dtype, blocksize and kind of scales."""
    return [
        OpQuery(op, device, dtype, blocksize, double)
        for op in OPS
        for dtype in DTYPES
        for blocksize in BLOCKSIZES
        for double in (False, True)
        if not (double and "Weight" not in OPERATIONS[op].arguments)
    ]


def test_attributes(backend):
    assert isinstance(backend, Backend) and backend.api_version == API_VERSION
    assert re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", backend.name)
    assert isinstance(backend.device_types, tuple) and backend.device_types
    assert isinstance(backend.priority, int)
    assert backend.unavailable() is None


def test_default_blocksize(backend, device):
    assert backend.default_blocksize(device) in BLOCKSIZES


def test_supports_answers_everything(backend, device):
    """`supports` never raises, gives a Support, the same one twice, and a reason with every no."""
    for query in every_query(device):
        answer = backend.supports(query)
        assert isinstance(answer, Support), f"{dispatch.format_query(query)}: {answer!r} is not a Support"
        assert answer or answer.reason, f"{dispatch.format_query(query)}: a no without a reason"
        assert answer == backend.supports(query)
    unheard_of = OpQuery("an_op_of_the_future", device, torch.float32, 64)
    assert isinstance(backend.supports(unheard_of), Support)


def test_supports_the_required_ops(backend, device):
    """At least one kind of weight can be quantized and dequantized: else every other test would be a skip."""
    for op in ("quantize_4bit", "dequantize_4bit"):
        queries = [query for query in every_query(device) if query.op == op]
        assert any(dispatch.ask(backend, query) for query in queries), f"{backend.name} declines every {op}"


def test_what_is_declined_raises(backend, device):
    """Inside use_backend a declined op is an error with the backend's reason, never another backend's work."""
    declined = [query for query in every_query(device) if not dispatch.ask(backend, query)]
    if not declined:
        pytest.skip(f"{backend.name} declines nothing")
    for query in declined:
        with pytest.raises(fourbit.NoBackendError) as error:
            dispatch.resolve(query)
        assert dispatch.ask(backend, query).reason in str(error.value)


def test_what_is_supported_runs_here(backend, device):
    for query in every_query(device):
        if dispatch.ask(backend, query):
            assert dispatch.resolve(query).backend is backend


def test_describe(backend, device):
    """One line for `fourbit.explain`, for every op that is supported."""
    for query in every_query(device):
        if dispatch.ask(backend, query):
            line = backend.describe(query, (64, 64))
            assert isinstance(line, str) and line.strip() and "\n" not in line


def test_listed(backend):
    """`fourbit.backends()` says that it is ready, and where it came from."""
    (info,) = [info for info in fourbit.backends() if (info.name, info.state) == (backend.name, "ready")]
    assert info.device_types == backend.device_types
    assert info.source


def test_used_inside_use_backend(need, backend, device):
    need("quantize_4bit")
    fourbit.quantize_4bit(normal(64).to(device), blocksize=64)
    used = {resolution.backend.name for resolution in dispatch.resolutions()}
    assert used == {backend.name}
