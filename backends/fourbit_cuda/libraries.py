"""Which NVRTC is at hand: its version and the architectures that it knows, without importing its Python binding.

Where code is cached nothing is compiled, and importing `cuda.bindings.nvrtc` takes longer than all the rest of a
first call. So the library is looked for where its wheels put it, loaded and asked; the binding, imported when
something has to be compiled, finds it loaded and uses it. Elsewhere the binding looks for it.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from pathlib import Path

import torch

WHEEL_PATHS = ("nvidia/cu13/lib/libnvrtc.so.13", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12")


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """The wheel's library for the CUDA version that cuda-python is for; None if there is none."""
    if not sys.platform.startswith("linux"):
        return None
    wanted = f".so.{_major()}"
    for name in WHEEL_PATHS:
        for folder in sys.path if name.endswith(wanted) else ():
            path = Path(folder) / name
            if path.is_file():
                try:
                    return ctypes.CDLL(str(path))
                except OSError:
                    return None
    return None


def _major() -> str:
    """CUDA's major version in cuda-python, whose binding loads the NVRTC of the same."""
    try:
        from cuda.bindings import __version__

        return str(__version__).split(".")[0]
    except ImportError:
        return (torch.version.cuda or "").split(".")[0]


@lru_cache(maxsize=1)
def version() -> tuple[int, int]:
    """NVRTC's version. Raises if it cannot be loaded."""
    library = _library()
    if library is not None:
        major, minor = ctypes.c_int(), ctypes.c_int()
        if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) == 0:
            return major.value, minor.value
    from cuda.bindings import nvrtc

    error, found_major, found_minor = nvrtc.nvrtcVersion()
    if int(error):
        raise RuntimeError(f"NVRTC does not tell its version: {error}")
    return int(found_major), int(found_minor)


def version_text() -> str:
    """NVRTC's version as "13.0"."""
    return ".".join(map(str, version()))


@lru_cache(maxsize=1)
def known_archs() -> tuple[int, ...]:
    """Compute capabilities times ten that it compiles for, ascending. Raises if it cannot be loaded."""
    library = _library()
    if library is not None:
        count = ctypes.c_int()
        if library.nvrtcGetNumSupportedArchs(ctypes.byref(count)) == 0:
            archs = (ctypes.c_int * count.value)()
            if library.nvrtcGetSupportedArchs(archs) == 0:
                return tuple(sorted(archs))
    from cuda.bindings import nvrtc

    error, found = nvrtc.nvrtcGetSupportedArchs()
    if int(error):
        raise RuntimeError(f"NVRTC does not tell its architectures: {error}")
    return tuple(sorted(int(arch) for arch in found))
