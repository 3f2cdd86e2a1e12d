"""Fixtures: the emulator behind hip-python, and the rocm backend for an architecture in it."""

from __future__ import annotations

import os

import pytest

from tests.rocm.gcn import tiers
from tests.rocm.gcn.backend import EmulatedBackend, emulator
from tests.rocm.gcn.disassembly import OLDEST_ENOUGH, objdump
from tests.support import installed, skip_or_fail


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory):
    """Compiled code of this run only, shared by its workers: what CI runs, it has compiled."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    before = os.environ.get("FOURBIT_CACHE_DIR")
    os.environ["FOURBIT_CACHE_DIR"] = str(folder / "rocm-code")
    yield
    if before is None:
        del os.environ["FOURBIT_CACHE_DIR"]
    else:
        os.environ["FOURBIT_CACHE_DIR"] = before


@pytest.fixture(scope="session")
def device():
    """The emulated device: hip-python over the stand-in, with Debian's hipRTC."""
    if not installed("hip-python"):
        skip_or_fail('hip-python is missing: pip install "fourbit[rocm]"')
    if objdump() is None:
        skip_or_fail(f"llvm-objdump {OLDEST_ENOUGH} or newer is missing: run .ci/amdgpu (Debian: llvm-22)")
    return emulator(tiers.hiprtc5())


@pytest.fixture
def on(device):
    """`on(arch)`: the rocm backend on CPU tensors, launched into the emulator."""
    device.seed, device.schedule = 1, None
    return lambda arch, **options: EmulatedBackend(device, arch, **options)
