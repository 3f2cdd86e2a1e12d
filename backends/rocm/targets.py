"""The AMD architectures that the backend serves: wave size, matrix cores, and the oldest compiler that knows each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One architecture.

    Attributes:
        arch: such as "gfx90a".
        wave: lanes of a wave as hipRTC compiles for it by default, and as torch reports.
        has_mfma: whether it has CDNA's matrix cores (instructions of 16x16x16 on bfloat16 and float16).
        oldest_hip: HIP version (major, minor) whose hipRTC compiles for it.
    """

    arch: str
    wave: int
    has_mfma: bool
    oldest_hip: tuple[int, int]

    @property
    def mfma_is_exact_in_half(self) -> bool:
        """Whether the matrix cores keep denormal float16 numbers. CDNA 2 takes them for zero."""
        return self.has_mfma and self.arch != "gfx90a"

    @property
    def number(self) -> int:
        """The digits of `arch` read as hexadecimal (0x90a), the FB_ARCH of the kernels."""
        return int(self.arch.removeprefix("gfx"), 16)


def _family(archs: str, wave: int, has_mfma: bool, oldest_hip: tuple[int, int]) -> dict[str, Target]:
    return {arch: Target(arch, wave, has_mfma, oldest_hip) for arch in archs.split()}


TARGETS: dict[str, Target] = {
    **_family("gfx90a", 64, True, (5, 0)),
    **_family("gfx942", 64, True, (6, 0)),
    **_family("gfx950", 64, True, (6, 4)),
    **_family("gfx1030 gfx1031 gfx1032", 32, False, (5, 0)),
    **_family("gfx1100 gfx1101 gfx1102 gfx1103", 32, False, (6, 0)),
    **_family("gfx1150 gfx1151", 32, False, (6, 4)),
    **_family("gfx1200 gfx1201", 32, False, (6, 4)),
}
"""CDNA 2, 3 and 4, then RDNA 2, 3, 3.5 and 4."""


class UnknownArchError(RuntimeError):
    """The backend, or the hipRTC at hand, does not know the architecture."""


def arch_of(gcn_arch_name: str | bytes) -> str:
    """The architecture in a driver's name for it: "gfx90a" of "gfx90a:sramecc+:xnack-"."""
    text = gcn_arch_name.decode() if isinstance(gcn_arch_name, bytes) else gcn_arch_name
    return text.split(":")[0].strip("\0 ")


def target(arch: str) -> Target:
    """The Target of `arch`. Raises UnknownArchError, naming those that are served."""
    found = TARGETS.get(arch)
    if found is None:
        raise UnknownArchError(f"the rocm backend has no kernels for {arch!r}; it serves {', '.join(TARGETS)}")
    return found


def check_compiler(where: Target, hip: tuple[int, int]) -> None:
    """Raise UnknownArchError if a hipRTC of version `hip` does not know the architecture.

    It must not be tried out: an older hipRTC ends the process when it is asked for one that it does not know.
    """
    if hip < where.oldest_hip:
        raise UnknownArchError(
            f"hipRTC {hip[0]}.{hip[1]} does not compile for {where.arch}: HIP {where.oldest_hip[0]}."
            f"{where.oldest_hip[1]} or newer is needed, so install a torch for a newer ROCm"
        )
