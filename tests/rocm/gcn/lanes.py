"""Data movement between lanes: DPP on any vector instruction, lane reads and writes, permutes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.rocm.gcn.disassembly import Instruction
from tests.rocm.gcn.errors import UnknownInstruction
from tests.rocm.gcn.operands import register, scalar_reader, vector_reader, vector_writer
from tests.rocm.gcn.waves import Waves

Run = Callable[[Waves], None]
Shifted = Callable[[Waves], tuple[np.ndarray, np.ndarray]]

CONTROLS = (
    "quad_perm",
    "row_shl",
    "row_shr",
    "row_ror",
    "row_mirror",
    "row_half_mirror",
    "row_bcast",
    "row_newbcast",
    "row_share",
    "row_xmask",
    "dpp8",
)
MODIFIERS = {*CONTROLS, "row_mask", "bank_mask", "bound_ctrl", "fi"}
OUTSIDE = -1


def used(instruction: Instruction) -> bool:
    """Whether the instruction moves its first operand between lanes."""
    return any(name in CONTROLS for name, _ in instruction.modifiers)


def _source_lanes(instruction: Instruction, lanes: int) -> np.ndarray:
    """For each lane the lane that it reads, or OUTSIDE."""
    ((name, text),) = [pair for pair in instruction.modifiers if pair[0] in CONTROLS]
    lane = np.arange(lanes)
    row, place = lane & ~15, lane & 15
    if name in ("quad_perm", "dpp8"):
        table = np.array([int(digit) for digit in text.strip("[]").split(",")])
        return (lane & ~(len(table) - 1)) + table[lane % len(table)]
    if name == "row_mirror":
        return row + 15 - place
    if name == "row_half_mirror":
        return (lane & ~7) + 7 - (lane & 7)
    amount = int(text, 0)
    if name == "row_shl":
        return np.where(place + amount < 16, lane + amount, OUTSIDE)
    if name == "row_shr":
        return np.where(place >= amount, lane - amount, OUTSIDE)
    if name == "row_ror":
        return row + (place - amount) % 16
    if name in ("row_newbcast", "row_share"):
        return row + amount
    if name == "row_xmask":
        return row + (place ^ amount)
    if name == "row_bcast" and amount == 15:
        return np.where(row > 0, row - 1, OUTSIDE)
    if name == "row_bcast" and amount == 31:
        return np.where(lane >= 32, 31, OUTSIDE)
    raise UnknownInstruction(instruction.text)


def dpp_reader(instruction: Instruction, text: str, kind: str) -> Shifted:
    """Reads the first operand from other lanes: (values, the lanes that may write)."""
    plain = vector_reader(text, kind)
    fetch_inactive = instruction.modifier("fi") == "1"
    zero_outside = bool(instruction.modifier("bound_ctrl"))
    row_mask = int(instruction.modifier("row_mask", "0xf"), 16)
    bank_mask = int(instruction.modifier("bank_mask", "0xf"), 16)
    cache: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def read(waves: Waves) -> tuple[np.ndarray, np.ndarray]:
        if waves.lanes not in cache:
            source = _source_lanes(instruction, waves.lanes)
            lane = np.arange(waves.lanes)
            writes = ((row_mask >> (lane // 16)) & 1).astype(bool) & ((bank_mask >> (lane % 16 // 4)) & 1).astype(bool)
            cache[waves.lanes] = np.maximum(source, 0), source != OUTSIDE, writes
        source, inside, writes = cache[waves.lanes]
        value = np.broadcast_to(plain(waves), (waves.count, waves.lanes))[:, source]
        valid = np.broadcast_to(inside, value.shape) if fetch_inactive else inside & waves.exec[:, source]
        if zero_outside:
            return np.where(valid, value, value.dtype.type(0)), np.broadcast_to(writes, value.shape)
        return value, valid & writes

    return read


def _read_first_lane(instruction: Instruction, target: str) -> Run:
    destination, source = register(instruction.operands[0]), vector_reader(instruction.operands[1], "u32")

    def run(waves: Waves) -> None:
        value = np.broadcast_to(source(waves), (waves.count, waves.lanes))
        first = waves.exec.argmax(axis=1)  # lane 0 if none is set, as the hardware does
        waves.set_s(destination.index, value[np.arange(waves.count), first])

    return run


def _read_lane(instruction: Instruction, target: str) -> Run:
    destination, source = register(instruction.operands[0]), vector_reader(instruction.operands[1], "u32")
    select = scalar_reader(instruction.operands[2], "u32")

    def run(waves: Waves) -> None:
        value = np.broadcast_to(source(waves), (waves.count, waves.lanes))
        lane = np.broadcast_to(select(waves), (waves.count,)) % np.uint32(waves.lanes)
        waves.set_s(destination.index, value[np.arange(waves.count), lane])

    return run


def _write_lane(instruction: Instruction, target: str) -> Run:
    destination, source = register(instruction.operands[0]), scalar_reader(instruction.operands[1], "u32")
    select = scalar_reader(instruction.operands[2], "u32")

    def run(waves: Waves) -> None:
        lane = np.broadcast_to(select(waves), (waves.count,)) % np.uint32(waves.lanes)
        value = np.broadcast_to(source(waves), (waves.count,))
        chosen = np.flatnonzero(waves.active)
        waves.v[destination.index][chosen, lane[chosen]] = value[chosen]  # whatever exec says

    return run


def _mbcnt(instruction: Instruction, target: str) -> Run:
    """Counts the bits of a mask below the lane, in lanes 0-31 or 32-63."""
    write = vector_writer(instruction.operands[0], "u32")
    mask = vector_reader(instruction.operands[1], "u32")
    addend = vector_reader(instruction.operands[2], "u32")
    high = "_hi_" in instruction.mnemonic

    def run(waves: Waves) -> None:
        lane = waves.lane.astype(np.int64) - 32 * high
        below = ((np.int64(1) << np.clip(lane, 0, 32)) - 1).astype(np.uint32)
        write(waves, np.bitwise_count(mask(waves) & below).astype(np.uint32) + addend(waves))

    return run


def _permute_rows(instruction: Instruction, target: str) -> Run:
    """v_permlane16_b32 and v_permlanex16_b32: any lane of one's own row of 16, or of the neighbouring row."""
    destination, source = instruction.operands[0], vector_reader(instruction.operands[1], "u32")
    write = vector_writer(destination, "u32")
    selects = [scalar_reader(text, "u32") for text in instruction.operands[2:4]]
    cross = "permlanex16" in instruction.mnemonic
    options = instruction.modifier("op_sel", "[0,0]").strip("[]").split(",")
    fetch_inactive, zero_outside = options[0] == "1", options[1] == "1"

    def run(waves: Waves) -> None:
        value = np.broadcast_to(source(waves), (waves.count, waves.lanes))
        low, high = (np.broadcast_to(select(waves), (waves.count,)).astype(np.uint64) for select in selects)
        table = low | high << np.uint64(32)
        lane = np.arange(waves.lanes)
        place = (table[:, None] >> (4 * (lane & 15)).astype(np.uint64)[None, :]) & np.uint64(15)
        row = (lane & ~15) ^ (16 if cross else 0)
        chosen = row[None, :] + place.astype(np.int64)
        moved = np.take_along_axis(value, chosen, axis=1)
        valid = np.ones(moved.shape, bool) if fetch_inactive else np.take_along_axis(waves.exec, chosen, axis=1)
        if zero_outside:
            moved = np.where(valid, moved, np.uint32(0))
        else:
            moved = np.where(valid, moved, waves.v[register(destination).index])
        write(waves, moved)

    return run


def _permute_halves(instruction: Instruction, target: str) -> Run:
    """v_permlane64_b32: the two halves of a wave64 change places."""
    write, source = vector_writer(instruction.operands[0], "u32"), vector_reader(instruction.operands[1], "u32")

    def run(waves: Waves) -> None:
        value = np.broadcast_to(source(waves), (waves.count, waves.lanes))
        write(waves, value if waves.lanes == 32 else np.roll(value, 32, axis=1))

    return run


def _swap_between_rows(instruction: Instruction, target: str) -> Run:
    """v_permlane32_swap_b32 and v_permlane16_swap_b32 (gfx950): odd rows of one register with even rows of another."""
    first, second = (register(text) for text in instruction.operands[:2])
    width = 32 if "32_swap" in instruction.mnemonic else 16

    def run(waves: Waves) -> None:
        lane = np.arange(waves.lanes)
        odd = (lane // width % 2).astype(bool)[None, :]
        a, b = waves.v[first.index].copy(), waves.v[second.index].copy()
        waves.set_v(first.index, np.where(odd, np.roll(b, width, axis=1), a))
        waves.set_v(second.index, np.where(odd, b, np.roll(a, -width, axis=1)))

    return run


def _swap(instruction: Instruction, target: str) -> Run:
    first, second = (register(text) for text in instruction.operands)

    def run(waves: Waves) -> None:
        a, b = waves.v[first.index].copy(), waves.v[second.index].copy()
        waves.set_v(first.index, b)
        waves.set_v(second.index, a)

    return run


LANE_OPS: dict[str, Callable[[Instruction, str], Run]] = {
    "v_readfirstlane_b32": _read_first_lane,
    "v_readlane_b32": _read_lane,
    "v_writelane_b32": _write_lane,
    "v_mbcnt_lo_u32_b32": _mbcnt,
    "v_mbcnt_hi_u32_b32": _mbcnt,
    "v_permlane16_b32": _permute_rows,
    "v_permlanex16_b32": _permute_rows,
    "v_permlane64_b32": _permute_halves,
    "v_permlane32_swap_b32": _swap_between_rows,
    "v_permlane16_swap_b32": _swap_between_rows,
    "v_swap_b32": _swap,
}
