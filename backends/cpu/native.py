"""The compiled module: whether it is there, which instruction set runs, and torch's threads for it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import ModuleType

import torch

ISA_VARIABLE = "FOURBIT_CPU_ISA"


def load() -> tuple[ModuleType | None, str]:
    """The module `_native`, ready to use, and the instruction set selected in it; or None, and why not.

    Raises ValueError if FOURBIT_CPU_ISA names an instruction set that is not to be had here: whoever forces
    one does not want another in silence.
    """
    try:
        from fourbit.backends.cpu import _native
    except ImportError as error:
        return (
            None,
            f"the compiled kernels are not in this installation ({error}); install a C++ compiler and reinstall",
        )
    found: list[str] = _native.instruction_sets()
    wanted = os.environ.get(ISA_VARIABLE, "").strip().lower() or found[0]
    if wanted not in found:
        raise ValueError(f"{ISA_VARIABLE}={wanted!r}: this machine and this build have {', '.join(found)}")
    _native.select_instruction_set(wanted)
    _native.set_parallel_for(_torch_parallel_for())
    return _native, wanted


def _torch_parallel_for() -> int:
    """The address of torch's C function of that name, 0 if it cannot be found: kernels then use one thread.

    Going through torch's own pool keeps `torch.set_num_threads` true and leaves no second pool to fight with.
    """
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll"):
        if (folder / name).exists():
            try:
                function = ctypes.CDLL(str(folder / name)).torch_parallel_for
            except (OSError, AttributeError):
                return 0
            return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0
