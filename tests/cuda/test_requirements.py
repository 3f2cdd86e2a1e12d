"""What `fourbit backends` says where CUDA kernels cannot run: exactly what is missing and what to install."""

from __future__ import annotations

import sys

import pytest
import torch

import fourbit_cuda
from fourbit_cuda import CudaBackend, requirements


@pytest.fixture
def machine(monkeypatch):
    """A machine with a torch for CUDA 12.8 and a GPU, whatever this one has; the caller takes something away."""
    from fourbit_cuda import driver, libraries

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(driver, "driver_version", lambda: (12, 9))
    monkeypatch.setattr(libraries, "version", lambda: (12, 9))
    return monkeypatch


def test_all_there(machine):
    assert CudaBackend().unavailable() is None


def test_torch_without_cuda(machine):
    machine.setattr(torch.version, "cuda", None)
    assert "is built without CUDA: install a CUDA build of torch" in requirements.missing()


def test_no_gpu(machine):
    machine.setattr(torch.cuda, "device_count", lambda: 0)
    from cuda.bindings import driver

    machine.setattr(driver, "cuDriverGetVersion", lambda: (0, 12080))
    assert "torch finds no NVIDIA GPU" in requirements.missing()
    machine.setattr(driver, "cuDriverGetVersion", lambda: (0, 11040))
    assert "driver supports only CUDA 11.4: update it" in requirements.missing()


def test_no_driver(machine):
    machine.setattr(torch.cuda, "device_count", lambda: 0)
    from cuda.bindings import driver

    def absent():
        raise RuntimeError("libcuda.so.1 not found\nmore")

    machine.setattr(driver, "cuDriverGetVersion", absent)
    assert requirements.missing().startswith(
        "there is no NVIDIA driver (RuntimeError: libcuda.so.1 not found): install"
    )


def test_no_cuda_python(machine):
    for name in [name for name in sys.modules if name.startswith("cuda.bindings")]:
        machine.setitem(sys.modules, name, None)
    from fourbit_cuda import driver

    def absent():
        raise ImportError("No module named 'cuda.bindings'")

    machine.setattr(driver, "driver_version", absent)
    assert requirements.missing().endswith('pip install "fourbit[cuda12]"')
    assert "cuda-python is missing" in requirements.missing()


def test_no_nvrtc(machine):
    from fourbit_cuda import libraries

    def absent():
        raise RuntimeError("Failed to load libnvrtc.so.12")

    machine.setattr(libraries, "version", absent)
    text = 'NVRTC cannot be loaded (RuntimeError: Failed to load libnvrtc.so.12): pip install "fourbit[cuda12]"'
    assert requirements.missing() == text


@pytest.mark.parametrize(("nvrtc", "fits"), (((12, 4), True), ((12, 9), True), ((13, 0), False)))
def test_driver_older_than_nvrtc(machine, nvrtc, fits):
    """Machine code runs on an older driver of the same CUDA major, and on none of an older major."""
    from fourbit_cuda import libraries

    machine.setattr(libraries, "version", lambda: nvrtc)
    text = requirements.missing()
    assert (text is None) == fits
    if not fits:
        assert "the NVIDIA driver supports CUDA 12.9 and NVRTC is 13.0" in text and '"fourbit[cuda12]"' in text


def test_a_driver_that_is_too_old(machine):
    from fourbit_cuda import driver

    machine.setattr(driver, "driver_version", lambda: (11, 8))
    assert requirements.missing() == "the NVIDIA driver supports only CUDA 11.8, and 12 is needed: update it"


def test_listed_and_never_in_the_way():
    """Ready or with its reason."""
    import fourbit

    (info,) = [info for info in fourbit.backends() if info.name == "cuda"]
    assert info.state in ("ready", "unavailable")
    assert info.state == "ready" or len(info.reason) > 20


def test_unavailable_under_rocm(monkeypatch):
    """ROCm's torch calls its devices "cuda" too: listed with the reason, and never asked."""

    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.version, "cuda", None)
    registered = []
    fourbit_cuda.fourbit_register_backends(registered.append)
    (backend,) = registered
    assert "is built without CUDA" in backend.unavailable()
