"""The compiled module: whether it is there, which instruction set runs, and torch's threads for it."""

from __future__ import annotations

import ctypes
import os
from types import ModuleType

from fourbit.float_environment import torch_parallel_for

ISA_VARIABLE = "FOURBIT_CPU_ISA"


def load() -> tuple[ModuleType | None, str]:
    """The module `_native`, ready to use, and the instruction set selected in it; or None, and why not.

    Raises ValueError if FOURBIT_CPU_ISA names an instruction set that is not to be had here: whoever forces
    one does not want another in silence.
    """
    try:
        from fourbit_cpu import _native
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
    # Torch's own pool keeps `torch.set_num_threads` true and leaves no second pool to fight with. None, 0: one thread.
    _native.set_parallel_for(ctypes.cast(torch_parallel_for(), ctypes.c_void_p).value or 0)
    return _native, wanted
