"""SDWA (gfx9 and gfx10): operands that are a byte or a word of a register, and results that fill only a part."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.rocm.gcn.disassembly import Instruction
from tests.rocm.gcn.errors import UnknownInstruction
from tests.rocm.gcn.operands import TYPES, Reader, register, vector_reader
from tests.rocm.gcn.waves import Waves

MODIFIERS = {"dst_sel", "dst_unused", "src0_sel", "src1_sel"}
PARTS = {"DWORD": (0, 32), **{f"WORD_{i}": (16 * i, 16) for i in (0, 1)}, **{f"BYTE_{i}": (8 * i, 8) for i in range(4)}}


def used(instruction: Instruction) -> bool:
    """Whether the instruction has sub-dword operands."""
    return any(name in MODIFIERS for name, _ in instruction.modifiers)


def reader(instruction: Instruction, text: str, kind: str, position: int) -> Reader:
    """Reads source 0 or 1: the selected part, zero- or sign-extended to the operand's type."""
    shift, bits = PARTS[instruction.modifier(f"src{position}_sel", "DWORD")]
    if kind == "m":
        return vector_reader(text, kind)
    if bits == 32:
        return vector_reader(text, kind)
    match = re.fullmatch(r"sext\((.*)\)", text)
    signed, text = match is not None, match[1] if match else text
    if text.startswith(("-", "|")):
        raise UnknownInstruction(instruction.text)
    dtype, width = TYPES[kind]
    if width > 32 or (kind[0] == "f" and width != bits):
        raise UnknownInstruction(instruction.text)
    plain = vector_reader(text, "u32")

    def read(waves: Waves) -> np.ndarray:
        value = (plain(waves) >> np.uint32(shift)) & np.uint32((1 << bits) - 1)
        if signed:
            value = (value << np.uint32(32 - bits)).view(np.int32) >> np.int32(32 - bits)
        if kind[0] == "f":
            return value.astype(np.uint16).view(dtype)
        return value.astype(dtype)

    return read


def writer(instruction: Instruction, result: str) -> Callable[[Waves, np.ndarray], None]:
    """Writes the result into the selected part; the rest is cleared, kept, or filled with the sign."""
    shift, bits = PARTS[instruction.modifier("dst_sel", "DWORD")]
    unused = instruction.modifier("dst_unused", "UNUSED_PAD")
    if result == "m":
        raise UnknownInstruction(instruction.text)
    width = TYPES[result][1]
    if width > 32 or unused not in ("UNUSED_PAD", "UNUSED_PRESERVE"):
        raise UnknownInstruction(instruction.text)
    destination = register(instruction.operands[0])
    part = np.uint32((1 << bits) - 1)
    raw = np.uint16 if width == 16 else np.uint32

    def write(waves: Waves, value: np.ndarray) -> None:
        placed = (np.ascontiguousarray(value).view(raw).astype(np.uint32) & part) << np.uint32(shift)
        if unused == "UNUSED_PRESERVE":
            placed = placed | waves.v[destination.index] & ~(part << np.uint32(shift))
        waves.set_v(destination.index, placed)

    return write
