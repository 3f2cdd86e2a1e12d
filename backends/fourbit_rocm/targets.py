"""The AMD architectures that the backend serves: waves, matrix cores, what a unit holds, the oldest compiler for each.

A unit is what HIP counts as multiProcessorCount, and with it torch as multi_processor_count. On CDNA that is a compute
unit. On RDNA it is a workgroup processor of two compute units (HIP's documentation of
hipDeviceAttributeMultiprocessorCount; "CU mode vs WGP mode" in that of hipRTC): an RX 7900 XTX has 96 compute units and
counts 48. A workgroup processor's LDS is 128 KB, of which one workgroup can have 64 KB. In WGP mode, for which hipRTC 6
compiles, a workgroup has both compute units; in CU mode, hipRTC 5.2's choice, one of them and its half of the LDS.

Sizes are from ROCm's "AMD GPU specifications" and AMD's ISA documents; the granules of allocation and the waves of a
SIMD from LLVM's "User Guide for AMDGPU Backend" and its AMDGPU subtarget.
"""

from __future__ import annotations

from dataclasses import dataclass

from fourbit_rocm.codeobject import KernelInfo

SIMDS = 4
"""SIMDs of a unit: of a CDNA compute unit, and of an RDNA workgroup processor, two in each of its compute units."""

SGPRS = 800
"""Scalar registers of a SIMD that CDNA's waves share, in granules of 16; each wave of RDNA has all that it can name."""


@dataclass(frozen=True)
class Unit:
    """What a unit (the module's docstring says of what) holds at once. Sizes in bytes.

    Attributes:
        compute_units: one, or the two of a workgroup processor.
        lds: of the unit.
        lds_of_workgroup: that one workgroup can have.
        lds_granule: in which LDS is given out.
        vgprs: vector registers of a SIMD, in rows of one wave's width.
        vgpr_granule: in which they are given out.
        waves: of a SIMD.
    """

    compute_units: int
    lds: int
    lds_of_workgroup: int
    lds_granule: int
    vgprs: int
    vgpr_granule: int
    waves: int


@dataclass(frozen=True)
class Target:
    """One architecture.

    Attributes:
        arch: such as "gfx90a".
        wave: lanes of a wave as hipRTC compiles for it by default, and as torch reports.
        has_mfma: whether it has CDNA's matrix cores (instructions of 16x16x16 on bfloat16 and float16).
        oldest_hip: HIP version (major, minor) whose hipRTC compiles for it.
        unit: what each of the device's multiprocessors holds.
    """

    arch: str
    wave: int
    has_mfma: bool
    oldest_hip: tuple[int, int]
    unit: Unit

    @property
    def mfma_is_exact_in_half(self) -> bool:
        """Whether the matrix cores keep denormal float16 numbers. CDNA 2 takes them for zero."""
        return self.has_mfma and self.arch != "gfx90a"

    @property
    def number(self) -> int:
        """The digits of `arch` read as hexadecimal (0x90a), the FB_ARCH of the kernels."""
        return int(self.arch.removeprefix("gfx"), 16)

    def workgroups(self, info: KernelInfo, threads: int, dynamic_lds: int = 0) -> int:
        """How many workgroups of `threads` work items a unit holds at once: by LDS, registers and waves.

        Not hipModuleOccupancyMaxActiveBlocksPerMultiprocessor: it divides the LDS that one workgroup can have, 64 KB,
        also where a unit is a workgroup processor with twice as much (ROCm's clr, hip_platform.cpp).
        """
        unit = self.unit
        waves = min(unit.waves, unit.vgprs // _whole(info.vgprs, unit.vgpr_granule))
        if self.wave == 64:
            waves = min(waves, SGPRS // _whole(info.sgprs, 16))
        parts = 1 if info.wgp_mode else unit.compute_units
        by_waves = waves * SIMDS // parts // -(-threads // self.wave)
        by_lds = unit.lds // parts // _whole(info.lds_size + dynamic_lds, unit.lds_granule)
        return parts * min(by_waves, by_lds)


def _whole(size: int, granule: int) -> int:
    """`size` rounded up to whole granules, at least one."""
    return -(-max(size, 1) // granule) * granule


KB = 1024
_CDNA = Unit(1, 64 * KB, 64 * KB, 512, 512, 8, 8)
_CDNA4 = Unit(1, 160 * KB, 160 * KB, 1280, 512, 8, 8)
_RDNA = Unit(2, 128 * KB, 64 * KB, 512, 1024, 16, 16)
_RDNA_LARGE = Unit(2, 128 * KB, 64 * KB, 512, 1536, 24, 16)  # half as many registers again


def _family(archs: str, wave: int, has_mfma: bool, oldest_hip: tuple[int, int], unit: Unit) -> dict[str, Target]:
    return {arch: Target(arch, wave, has_mfma, oldest_hip, unit) for arch in archs.split()}


TARGETS: dict[str, Target] = {
    **_family("gfx90a", 64, True, (5, 0), _CDNA),
    **_family("gfx942", 64, True, (6, 0), _CDNA),
    **_family("gfx950", 64, True, (6, 4), _CDNA4),
    **_family("gfx1030 gfx1031 gfx1032", 32, False, (5, 0), _RDNA),
    **_family("gfx1100 gfx1101", 32, False, (6, 0), _RDNA_LARGE),
    **_family("gfx1102 gfx1103", 32, False, (6, 0), _RDNA),
    **_family("gfx1150", 32, False, (6, 4), _RDNA),
    **_family("gfx1151", 32, False, (6, 4), _RDNA_LARGE),
    **_family("gfx1200 gfx1201", 32, False, (6, 4), _RDNA_LARGE),
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
