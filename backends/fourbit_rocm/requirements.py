"""What this machine lacks for the ROCm backend, and what to install: the text that `fourbit backends` shows."""

from __future__ import annotations

import torch


def missing() -> str | None:
    """Why kernels cannot be compiled and launched here, or None if they can."""
    if torch.version.hip is None:
        return f"this torch ({torch.__version__}) is built without ROCm: install a ROCm build of torch"
    if torch.cuda.device_count() == 0:
        return (
            "torch finds no AMD GPU (torch.cuda.device_count() is 0): is the amdgpu driver loaded, may this user open"
            " /dev/kfd (group render), and are HIP_VISIBLE_DEVICES and ROCR_VISIBLE_DEVICES unset?"
        )
    return _no_bindings() or _no_known_device()


def _no_bindings() -> str | None:
    from fourbit_rocm import libraries

    try:
        libraries.hip_version()
    except ImportError as error:
        return f'hip-python is missing ({_first_line(error)}): pip install "fourbit[rocm]"'
    except Exception as error:
        return f"hip-python does not use torch's HIP libraries ({_first_line(error)}). {libraries.remedy()}"
    return None


def _no_known_device() -> str | None:
    from fourbit_rocm import libraries, targets

    reasons = []
    for index in range(torch.cuda.device_count()):
        arch = targets.arch_of(torch.cuda.get_device_properties(index).gcnArchName)
        try:
            targets.check_compiler(targets.target(arch), libraries.hip_version())
        except targets.UnknownArchError as error:
            reasons.append(f"device {index}: {error}")
        else:
            return None
    return "; ".join(reasons)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
