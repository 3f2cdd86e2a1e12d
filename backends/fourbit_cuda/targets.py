"""What to compile for: machine code of a GPU's own architecture, or PTX where the GPU is newer than NVRTC."""

from __future__ import annotations

from dataclasses import dataclass

from fourbit_cuda import libraries

OLDEST_ARCH = 75
"""Compute capability times ten of the oldest GPUs served (Turing)."""


@dataclass(frozen=True)
class Target:
    """What to compile for.

    Attributes:
        option: as `--gpu-architecture` wants it: sm_90, sm_90a, or compute_90 for PTX.
        arch: the compute capability times ten that `option` names.
        is_ptx: whether the driver has to finish the job.
    """

    option: str
    arch: int
    is_ptx: bool


def target(arch: int, arch_specific: bool = False, known: tuple[int, ...] | None = None) -> Target:
    """How to compile for a GPU of compute capability `arch` / 10.

    Machine code if NVRTC knows the arch; else PTX for the newest arch that it knows below, from which the
    driver makes machine code. Raises RuntimeError if there is neither.
    """
    known = libraries.known_archs() if known is None else known
    if arch in known:
        return Target(f"sm_{arch}{'a' if arch_specific else ''}", arch, False)
    older = [each for each in known if each < arch]
    if not older or arch_specific:
        what = f"sm_{arch}a" if arch_specific else f"sm_{arch}"
        raise RuntimeError(
            f"NVRTC {libraries.version_text()} does not compile for {what}, only for {', '.join(map(str, known))};"
            " install another nvidia-cuda-nvrtc"
        )
    return Target(f"compute_{older[-1]}", older[-1], True)
