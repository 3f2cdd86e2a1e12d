"""Launches: kernel arguments and initial registers, as the runtime and the command processor set them up.

After LLVM's "User Guide for AMDGPU Backend": the kernel descriptor says which registers are wanted, and hidden
arguments follow the explicit ones in the kernarg segment.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

import numpy as np

from fourbit_rocm.codeobject import KernelInfo, parse, unbundle
from tests.rocm.gcn import lds
from tests.rocm.gcn.disassembly import disassemble
from tests.rocm.gcn.errors import EmulatorError, UnknownInstruction
from tests.rocm.gcn.machine import Program
from tests.rocm.gcn.memory import Memory
from tests.rocm.gcn.waves import TTMP, Waves

MAX_LDS = 65536
BATCH_LANES = 1 << 14
"""Lanes of a batch: enough that numpy's own cost per call vanishes, and few enough that a register stays in cache."""

ROUND_AND_DENORMALS = 0xF0
"""Of compute_pgm_rsrc1: round to nearest even, keep denormals of every type."""


@dataclass
class Kernel:
    """A kernel of a loaded code object."""

    target: str
    info: KernelInfo
    program: Program

    def launch(
        self,
        memory: Memory,
        grid: tuple[int, int, int],
        threads: tuple[int, int, int],
        arguments: bytes,
        dynamic_lds: int = 0,
        seed: int = 0,
        schedule: int | None = None,
    ) -> None:
        """Run `grid` workgroups of `threads` work items; `arguments` are the explicit ones, packed."""
        info, count = self.info, int(np.prod(threads))
        if threads[1:] != (1, 1):
            raise UnknownInstruction("workgroups of more than one dimension")
        if count > info.max_workgroup_size:
            raise EmulatorError(f"{info.name}: {count} work items, compiled for at most {info.max_workgroup_size}")
        if info.private_size:
            raise UnknownInstruction(f"{info.name} uses scratch memory")
        size = info.lds_size + dynamic_lds
        if size > MAX_LDS:
            raise EmulatorError(f"{info.name}: {size} bytes of LDS, a workgroup may have {MAX_LDS}")
        kernarg = np.frombuffer(self._kernarg(arguments, grid, threads, dynamic_lds), np.uint8).copy()
        packet = np.frombuffer(_dispatch_packet(grid, threads, info.private_size, size), np.uint8).copy()
        pointers = {"kernarg": kernarg.ctypes.data, "dispatch": packet.ctypes.data}
        memory.register(pointers["kernarg"], kernarg.size, writable=False, name="kernel arguments")
        memory.register(pointers["dispatch"], packet.size, writable=False, name="dispatch packet")
        try:
            groups = int(np.prod(grid))
            per_group = -(-count // info.wavefront_size)
            batch = max(BATCH_LANES // (per_group * info.wavefront_size), 1)
            for first in range(0, groups, batch):
                self._run(range(first, min(first + batch, groups)), grid, count, size, memory, pointers, seed, schedule)
        finally:
            for address in pointers.values():
                memory.unregister(address)

    def _run(self, groups: range, grid: tuple[int, int, int], count: int, size: int, memory: Memory,
             pointers: dict[str, int], seed: int, schedule: int | None) -> None:  # fmt: skip
        info = self.info
        per_group = -(-count // info.wavefront_size)
        workgroup = np.repeat(np.arange(len(groups)), per_group)
        number = np.tile(np.arange(per_group), len(groups))
        waves = Waves(
            len(workgroup), info.wavefront_size, max(info.vgprs - info.agprs, 1), info.agprs, workgroup, number, seed
        )
        index = np.array(groups)[workgroup]
        ids = index % grid[0], index // grid[0] % grid[1], index // (grid[0] * grid[1])
        self._initial_registers(waves, ids, number, count, pointers)
        local = lds.LocalMemory(len(groups), size, self.program.lds_unit, per_group, seed + 1)
        self.program.run(waves, local, memory, schedule)

    def _initial_registers(
        self, waves: Waves, ids: tuple[np.ndarray, ...], number: np.ndarray, count: int, pointers: dict[str, int]
    ) -> None:
        rsrc1, rsrc2 = struct.unpack_from("<II", self.info.descriptor, 48)
        (properties,) = struct.unpack_from("<H", self.info.descriptor, 56)
        if (rsrc1 >> 12) & 0xFF != ROUND_AND_DENORMALS:
            raise UnknownInstruction(f"float mode {(rsrc1 >> 12) & 0xFF:#x}")
        if struct.unpack_from("<H", self.info.descriptor, 58)[0] & 0x7F:
            raise UnknownInstruction("kernel arguments preloaded into registers")
        register = 0
        user = ((4, None), (2, "dispatch"), (2, None), (2, "kernarg"), (2, None), (2, None), (1, None))
        for bit, (width, name) in enumerate(user):
            if properties >> bit & 1:
                if name is not None:
                    waves.s[register] = pointers[name] & 0xFFFFFFFF
                    waves.s[register + 1] = pointers[name] >> 32
                register += width  # the others stay garbage: nothing here may need them
        register = rsrc2 >> 1 & 31  # the count of user registers, which may be more than are wanted (gfx11)
        if self.target.startswith("gfx12"):
            waves.s[TTMP + 9] = ids[0]
            waves.s[TTMP + 7] = ids[1] | ids[2] << 16
        else:
            for bit in range(3):
                if rsrc2 >> (7 + bit) & 1:
                    waves.s[register] = ids[bit]
                    register += 1
        item = number[:, None] * waves.lanes + np.arange(waves.lanes)
        # one dimension: the packed form of three ids equals the id alone
        waves.v[0] = item
        if not _packs_ids(self.target):
            for dimension in range(1, (rsrc2 >> 11 & 3) + 1):
                waves.v[dimension] = 0
        waves.set_exec(item < count)

    def _kernarg(
        self, arguments: bytes, grid: tuple[int, int, int], threads: tuple[int, int, int], dynamic_lds: int
    ) -> bytes:
        # LLVM widens scalar loads within aligned groups of 16 bytes; the runtime's segments are aligned to more
        segment = bytearray(b"\xa5" * (-(-max(self.info.kernarg_size, 1) // 16) * 16))
        explicit = self.info.explicit_arguments
        end = max((argument.offset + argument.size for argument in explicit), default=0)
        if len(arguments) != end:
            raise EmulatorError(f"{self.info.name}: {len(arguments)} bytes of arguments, the code object has {end}")
        segment[:end] = arguments
        values: dict[str, int] = {"hidden_grid_dims": 3 - (grid[2] == 1) - (grid[1:] == (1, 1))}
        values["hidden_dynamic_lds_size"] = dynamic_lds
        for i, axis in enumerate("xyz"):
            values[f"hidden_block_count_{axis}"] = grid[i]
            values[f"hidden_group_size_{axis}"] = threads[i]
            values[f"hidden_remainder_{axis}"] = 0
            values[f"hidden_global_offset_{axis}"] = 0
        for argument in self.info.arguments:
            if argument.kind in values:
                data = values[argument.kind].to_bytes(argument.size, "little")
                segment[argument.offset : argument.offset + argument.size] = data
        return bytes(segment)


def _packs_ids(target: str) -> bool:
    """Whether a work item's three ids come in one register."""
    return target in ("gfx90a", "gfx942", "gfx950") or target.startswith(("gfx11", "gfx12"))


def _dispatch_packet(grid: tuple[int, int, int], threads: tuple[int, int, int], private: int, group: int) -> bytes:
    """hsa_kernel_dispatch_packet_t; sizes in work items."""
    total = [g * t for g, t in zip(grid, threads, strict=True)]
    return struct.pack("<HHHHHHIIIIIQQQQ", 0, 3, *threads, 0, *total, private, group, 0, 0, 0, 0)


@functools.cache
def load(image: bytes) -> dict[str, Kernel]:
    """The kernels of a code object (or of a bundle with one), by name."""
    image = unbundle(image)
    parsed = parse(image)
    code = disassemble(image, parsed.target)
    return {
        name: Kernel(parsed.target, info, Program(code[name], parsed.target, info.wavefront_size))
        for name, info in parsed.kernels.items()
    }
