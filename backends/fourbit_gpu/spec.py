"""KernelSpec: which kernel, with which compile-time choices. What a compiler module needs, and a cache key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

KERNELS = Path(__file__).with_name("kernels")
"""Folder of the kernel sources; `#include "shim.h"` there means `backends/fourbit_gpu/shim.h`."""


@dataclass(frozen=True)
class KernelSpec:
    """One variant of one kernel.

    Attributes:
        source: file name in `backends/fourbit_gpu/kernels`, such as "linear_mma.cu".
        name: the `extern "C"` name in it.
        defines: `(macro, value)` pairs, sorted by macro, each passed as -Dmacro=value.
        min_arch: smallest compute capability, times ten, that it compiles for (75, 80, ...).
        arch_specific: needs the instructions of one exact arch (sm_90a, not sm_90).
    """

    source: str
    name: str
    defines: tuple[tuple[str, int | str], ...] = ()
    min_arch: int = 75
    arch_specific: bool = False

    @classmethod
    def of(
        cls,
        source: str,
        name: str,
        defines: Mapping[str, int | str] | None = None,
        *,
        min_arch: int = 75,
        arch_specific: bool = False,
    ) -> KernelSpec:
        """A spec from a mapping of defines."""
        return cls(source, name, tuple(sorted((defines or {}).items())), min_arch, arch_specific)

    @property
    def options(self) -> tuple[str, ...]:
        """The defines as compiler options."""
        return tuple(f"-D{macro}={value}" for macro, value in self.defines)

    def label(self) -> str:
        """Readable name of the variant, for messages and tests."""
        inner = ", ".join(f"{macro}={value}" for macro, value in self.defines)
        return f"{self.name}[{inner}]" if inner else self.name


def read_source(name: str) -> str:
    """The text of a kernel source or, for "shim.h", of the vendor shim."""
    folder = KERNELS if name.endswith(".cu") else KERNELS.parent
    return (folder / name).read_text(encoding="utf-8")
