"""Runs a kernel: decodes it once into blocks of closures, then moves batches of waves through them.

Waves that stand at one block run it together. Of several blocks the one at the lowest address goes first, which brings
waves that took different ways back together; with a schedule seed the order is random instead, and waves of one block
are torn apart as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tests.rocm.gcn import compare, control, lanes, lds, matrix, memory, scalar, vector, vector_carry, vector_packed
from tests.rocm.gcn.disassembly import Instruction
from tests.rocm.gcn.errors import BarrierError, KernelTrap, UnknownInstruction
from tests.rocm.gcn.waves import Waves

Run = Callable[[Waves], None]
ENDED = -1


@dataclass
class Block:
    """Instructions that run one after the other; `last` may branch, wait or end."""

    address: int
    instructions: list[Instruction] = field(default_factory=list)
    steps: list[Run] = field(default_factory=list)
    last: Instruction | None = None
    following: int = 0


class Program:
    """A kernel's decoded instructions for one target."""

    def __init__(self, instructions: list[Instruction], target: str, lanes_per_wave: int) -> None:
        self.target, self.lanes = target, lanes_per_wave
        self.instructions = instructions
        self.local: lds.LocalMemory | None = None
        self.memory: memory.Memory | None = None
        self.executed = 0  # wave instructions
        self.lds_unit = lds.unit_of(instructions)
        self.blocks = self._blocks(instructions)

    def _blocks(self, instructions: list[Instruction]) -> dict[int, Block]:
        starts = {instructions[0].address}
        for instruction in instructions:
            if control.ends_block(instruction):
                starts.add(instruction.address + instruction.size)
                if instruction.mnemonic in control.CONDITIONS:
                    starts.add(control.branch_target(instruction))
        blocks: dict[int, Block] = {}
        block = Block(instructions[0].address)
        for instruction in instructions:
            if instruction.address in starts:
                block = blocks[instruction.address] = Block(instruction.address)
            block.following = instruction.address + instruction.size
            if control.ends_block(instruction):
                block.last = instruction
            else:
                block.instructions.append(instruction)
        return blocks

    def _decode(self, block: Block) -> None:
        """Closures are made when a block is first reached: what is never executed need not be known."""
        for instruction in block.instructions:
            if instruction.mnemonic not in control.NO_EFFECT:
                block.steps.append(self._step(instruction))

    def _step(self, instruction: Instruction) -> Run:
        name = vector.canonical(instruction.mnemonic)
        if instruction.second is not None:
            return vector.build_pair(instruction, self.target)
        if name in lanes.LANE_OPS:
            return lanes.LANE_OPS[name](instruction, self.target)
        if name in vector_carry.CARRY_OPS:
            return vector_carry.CARRY_OPS[name](instruction, self.target)
        if name in vector_packed.PACKED_OPS:
            return vector_packed.PACKED_OPS[name](instruction, self.target)
        if name.startswith("v_cmp"):
            return compare.build(instruction, self.target)
        if name.startswith("v_mfma"):
            return matrix.build(instruction, self.target)
        if name.startswith("v_"):
            return vector.build(instruction, self.target)
        if name.startswith("ds_"):
            return lds.build(instruction, lambda: self.local)
        if name.startswith(("global_", "flat_")):
            return memory.build_vector(instruction, lambda: self.memory)
        if name.startswith("s_load_"):
            return memory.build_scalar(instruction, lambda: self.memory)
        return scalar.build(instruction, self.target)

    def run(self, waves: Waves, local: lds.LocalMemory, mem: memory.Memory, schedule: int | None = None) -> None:
        """Run all waves to their end. Raises EmulatorError."""
        self.local, self.memory = local, mem
        place = np.full(waves.count, self.instructions[0].address, np.int64)
        waiting = np.zeros(waves.count, bool)
        random = None if schedule is None else np.random.default_rng(schedule)
        with np.errstate(all="ignore"):
            while True:
                ready = (place != ENDED) & ~waiting
                if not ready.any():
                    if not waiting.any():
                        return
                    self._release(waves, local, place, waiting)
                    continue
                address = int(place[ready].min() if random is None else random.choice(place[ready]))
                together = ready & (place == address)
                if random is not None:
                    together &= random.random(waves.count) < 0.5
                    if not together.any():
                        continue
                self._run_block(waves, address, together, place, waiting)

    def _run_block(
        self, waves: Waves, address: int, together: np.ndarray, place: np.ndarray, waiting: np.ndarray
    ) -> None:
        block = self.blocks.get(address)
        if block is None:
            raise UnknownInstruction(f"control reached {address:#x}, where no instruction was decoded")
        if not block.steps and block.instructions:
            self._decode(block)
        waves.activate(together)
        for step in block.steps:
            step(waves)
        self.executed += (len(block.instructions) + 1) * int(together.sum())
        place[together] = block.following
        last = block.last
        if last is None:
            return
        if last.mnemonic in control.ENDS:
            place[together] = ENDED
        elif last.mnemonic in control.BARRIERS:
            waiting |= together
        elif last.mnemonic in control.TRAPS:
            raise KernelTrap(f"the kernel trapped: {last.text} at {last.address:#x}")
        else:
            taken = together & control.CONDITIONS[last.mnemonic](waves)
            place[taken] = control.branch_target(last)

    def _release(self, waves: Waves, local: lds.LocalMemory, place: np.ndarray, waiting: np.ndarray) -> None:
        """All waves that can run wait at a barrier: let whole workgroups pass."""
        for group in np.unique(waves.workgroup[waiting]):
            members = waves.workgroup == group
            alive = members & (place != ENDED)
            if (alive & ~waiting).any() or len(np.unique(place[alive])) != 1:
                raise BarrierError("waves of a workgroup wait at different barriers")
            if (members & (place == ENDED)).any():
                raise BarrierError("a wave of a workgroup ended before a barrier that others wait at")
            waiting[members] = False
            local.barrier(np.array([group]))
