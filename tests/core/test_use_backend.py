"""use_backend: one backend and no other, however blocks nest and end, and on every thread."""

from __future__ import annotations

import threading

import pytest
import torch

import fourbit
from fourbit import dispatch, registry
from fourbit.backend import Backend
from fourbit.reference import ReferenceBackend
from tests.core.test_registry import W, make, no_trace_left  # noqa: F401


def used() -> set[str]:
    dispatch.clear_tables()
    fourbit.quantize_4bit(W)
    return {resolution.backend.name for resolution in dispatch.resolutions()}


def test_use_backend_nests():
    registry.register(make(name="one"))
    registry.register(make(name="two"))
    usual = used()
    with fourbit.use_backend("one") as backend:
        assert backend.name == "one" and used() == {"one"}
        with fourbit.use_backend("two"):
            assert used() == {"two"}
            with fourbit.use_backend("one"):
                assert used() == {"one"}
            assert used() == {"two"}
        assert used() == {"one"}
    assert used() == usual


def test_use_backend_ends_with_an_exception():
    registry.register(make(name="one"))
    with pytest.raises(ZeroDivisionError), fourbit.use_backend("one"):
        raise ZeroDivisionError
    assert not registry.state.forced and used() != {"one"}


def test_use_backend_of_an_unknown_name():
    with pytest.raises(fourbit.NoBackendError, match="(?s)'nonesuch' is not ready.*reference: ready"):
        with fourbit.use_backend("nonesuch"):
            raise AssertionError("the block ran")
    assert not registry.state.forced


def test_use_backend_holds_on_the_threads_of_autograd():
    calls: list[str] = []

    def grad(self: Backend, *args: object) -> torch.Tensor:
        calls.append(threading.current_thread().name)
        return ReferenceBackend.linear_4bit_grad(self, *args)

    registry.register(make(linear_4bit_grad=grad))
    packed, state = fourbit.quantize_4bit(W)
    x = torch.randn(2, 64, requires_grad=True)
    with fourbit.use_backend("fake"):
        fourbit.linear_4bit(x, packed, state).sum().backward()
    assert len(calls) == 1


def test_default_blocksize_follows_the_backend():
    registry.register(make(default_blocksize=lambda self, device: 128))
    assert fourbit.quantize_4bit(W)[1].blocksize == 64
    with fourbit.use_backend("fake"):
        assert fourbit.quantize_4bit(W)[1].blocksize == 128
