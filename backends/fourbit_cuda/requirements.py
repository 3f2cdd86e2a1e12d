"""What this machine lacks for the CUDA backend, and what to install: the text that `fourbit backends` shows."""

from __future__ import annotations

import torch

OLDEST_CUDA = 12


def missing() -> str | None:
    """Why CUDA kernels cannot be compiled and launched here, or None if they can. Makes no CUDA context."""
    built_for = torch.version.cuda
    if built_for is None:
        return (
            f"this torch ({torch.__version__}) is built without CUDA: install a CUDA build of torch,"
            ' and "fourbit[cuda13]" or "fourbit[cuda12]" for its CUDA version'
        )
    extra = extra_for(built_for)
    if torch.cuda.device_count() == 0:
        return _no_device(extra)
    return _no_driver(extra) or _no_nvrtc(extra)


def extra_for(cuda: str) -> str:
    """The extra that fits a torch built for CUDA version `cuda`, such as "13.0"."""
    return f'"fourbit[cuda{cuda.split(".")[0]}]"'


def _no_device(extra: str) -> str:
    try:
        from cuda.bindings import driver

        error, number = driver.cuDriverGetVersion()
    except ImportError:
        return f"torch finds no NVIDIA GPU (device_count() is 0), and cuda-python is missing: pip install {extra}"
    except Exception as failure:  # cuda-python's own, where the driver's library is not found
        return f"there is no NVIDIA driver ({_first_line(failure)}): install one; for WSL, the one of the host"
    if int(error) or number < OLDEST_CUDA * 1000:
        return f"the NVIDIA driver supports only CUDA {number // 1000}.{number % 1000 // 10}: update it"
    return "torch finds no NVIDIA GPU (torch.cuda.device_count() is 0): does CUDA_VISIBLE_DEVICES hide it?"


def _no_driver(extra: str) -> str | None:
    try:
        from fourbit_cuda.driver import driver_version

        version = driver_version()
    except ImportError as error:
        return f"cuda-python is missing ({_first_line(error)}): pip install {extra}"
    except Exception as error:
        return f"the NVIDIA driver cannot be used ({_first_line(error)}): reinstall it"
    if version[0] < OLDEST_CUDA:
        return f"the NVIDIA driver supports only CUDA {version[0]}.{version[1]}, and {OLDEST_CUDA} is needed: update it"
    return None


def _no_nvrtc(extra: str) -> str | None:
    from fourbit_cuda import libraries
    from fourbit_cuda.driver import driver_version

    try:
        nvrtc = libraries.version()
    except Exception as error:
        return f"NVRTC cannot be loaded ({_first_line(error)}): pip install {extra}"
    return too_new(nvrtc, driver_version())


def too_new(nvrtc: tuple[int, int], driver: tuple[int, int]) -> str | None:
    """Why the driver cannot run what NVRTC makes, or None. A driver runs machine code of its own CUDA major."""
    if nvrtc[0] <= driver[0]:
        return None
    return (
        f"the NVIDIA driver supports CUDA {driver[0]}.{driver[1]} and NVRTC is {nvrtc[0]}.{nvrtc[1]}:"
        f' update the driver, or pip install "fourbit[cuda{driver[0]}]" with a torch for CUDA {driver[0]}'
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
