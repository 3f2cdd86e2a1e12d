"""KernelSpec: which kernel, with which compile-time choices. What a compiler module needs, and a cache key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SHARED = "fourbit_gpu"
"""The package of the kernels and headers that serve both vendors."""


@dataclass(frozen=True)
class KernelSpec:
    """One variant of one kernel.

    Attributes:
        source: file name in the folder `kernels` of `package`, such as "quantize.cu".
        name: the `extern "C"` name in it.
        defines: `(macro, value)` pairs, sorted by macro, each passed as -Dmacro=value.
        package: where the source lies: `SHARED`, or the package of the only vendor that has a use for it.
        arch_specific: needs the instructions of one exact arch (sm_90a, not sm_90).
    """

    source: str
    name: str
    defines: tuple[tuple[str, int | str], ...] = ()
    package: str = SHARED
    arch_specific: bool = False

    @classmethod
    def of(
        cls,
        source: str,
        name: str,
        defines: Mapping[str, int | str] | None = None,
        *,
        package: str = SHARED,
        arch_specific: bool = False,
    ) -> KernelSpec:
        """A spec from a mapping of defines."""
        return cls(source, name, tuple(sorted((defines or {}).items())), package, arch_specific)

    @property
    def options(self) -> tuple[str, ...]:
        """The defines as compiler options."""
        return tuple(f"-D{macro}={value}" for macro, value in self.defines)

    def label(self) -> str:
        """Readable name of the variant, for messages and tests."""
        inner = ", ".join(f"{macro}={value}" for macro, value in self.defines)
        return f"{self.name}[{inner}]" if inner else self.name
