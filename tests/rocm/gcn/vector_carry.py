"""Vector instructions with more than one result, or that read a lane mask of their own: carries, division, mixes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.rocm.gcn import floats
from tests.rocm.gcn.disassembly import Instruction
from tests.rocm.gcn.errors import UnknownInstruction
from tests.rocm.gcn.operands import mask_reader, register, vector_reader, vector_writer
from tests.rocm.gcn.vector import canonical, check_modifiers
from tests.rocm.gcn.waves import VCC, Waves

Run = Callable[[Waves], None]
U64 = np.uint64


def _add(a: np.ndarray, b: np.ndarray, carry: np.ndarray) -> np.ndarray:
    return a.astype(U64) + b.astype(U64) + carry


def _subtract(a: np.ndarray, b: np.ndarray, borrow: np.ndarray) -> np.ndarray:
    return a.astype(U64) - b.astype(U64) - borrow  # bit 32 is the borrow


def _reversed_subtract(a: np.ndarray, b: np.ndarray, borrow: np.ndarray) -> np.ndarray:
    return _subtract(b, a, borrow)


CARRY = {"v_add": _add, "v_sub": _subtract, "v_subrev": _reversed_subtract}
NO_CARRY = np.zeros((1, 1), U64)


def _carry(instruction: Instruction, target: str) -> Run:
    check_modifiers(instruction, set())
    function = CARRY[canonical(instruction.mnemonic).split("_co_")[0].replace("_addc", "_add").replace("subb", "sub")]
    operands = instruction.operands
    write, flag = vector_writer(operands[0], "u32"), register(operands[1])
    a, b = vector_reader(operands[2], "u32"), vector_reader(operands[3], "u32")
    carry_in = mask_reader(operands[4]) if len(operands) == 5 else None

    def run(waves: Waves) -> None:
        carry = NO_CARRY if carry_in is None else carry_in(waves).astype(U64)
        total = function(a(waves), b(waves), carry)
        out = np.broadcast_to((total >> U64(32)) & U64(1) != 0, waves.mask.shape)
        write(waves, total.astype(np.uint32))
        waves.set_mask_at(flag.index, out & waves.mask)

    return run


def _multiply_add_64(instruction: Instruction, target: str) -> Run:
    check_modifiers(instruction, set())
    operands = instruction.operands
    signed = "_i64_i32" in instruction.mnemonic
    if len(operands) != 5:
        raise UnknownInstruction(instruction.text)
    write, flag = vector_writer(operands[0], "u64"), register(operands[1])
    a, b = (vector_reader(text, "i32" if signed else "u32") for text in operands[2:4])
    c = vector_reader(operands[4], "i64" if signed else "u64")
    wide = np.int64 if signed else U64

    def run(waves: Waves) -> None:
        product, addend = a(waves).astype(wide) * b(waves).astype(wide), c(waves)
        total = product + addend
        overflow = (total < addend) != (product < 0) if signed else total < product
        write(waves, total.view(U64))
        waves.set_mask_at(flag.index, np.broadcast_to(overflow, waves.mask.shape) & waves.mask)

    return run


def _div_scale(instruction: Instruction, target: str) -> Run:
    check_modifiers(instruction, set())
    operands = instruction.operands
    write, flag = vector_writer(operands[0], "f32"), register(operands[1])
    value, denominator, numerator = (vector_reader(text, "f32") for text in operands[2:5])

    def run(waves: Waves) -> None:
        scaled, scale_back = floats.div_scale(value(waves), denominator(waves), numerator(waves))
        write(waves, scaled)
        waves.set_mask_at(flag.index, np.broadcast_to(scale_back, waves.mask.shape) & waves.mask)

    return run


def _div_fmas(instruction: Instruction, target: str) -> Run:
    check_modifiers(instruction, set())
    write = vector_writer(instruction.operands[0], "f32")
    a, b, c = (vector_reader(text, "f32") for text in instruction.operands[1:4])
    return lambda waves: write(waves, floats.div_fmas(a(waves), b(waves), c(waves), waves.mask_at(VCC)))


CARRY_OPS: dict[str, Callable[[Instruction, str], Run]] = {
    **dict.fromkeys(("v_add_co_u32", "v_sub_co_u32", "v_subrev_co_u32"), _carry),
    **dict.fromkeys(("v_addc_co_u32", "v_subb_co_u32", "v_subbrev_co_u32"), _carry),
    **dict.fromkeys(("v_add_co_ci_u32", "v_sub_co_ci_u32", "v_subrev_co_ci_u32"), _carry),
    **dict.fromkeys(("v_mad_u64_u32", "v_mad_i64_i32", "v_mad_co_u64_u32", "v_mad_co_i64_i32"), _multiply_add_64),
    "v_div_scale_f32": _div_scale,
    "v_div_fmas_f32": _div_fmas,
}
