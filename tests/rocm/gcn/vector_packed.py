"""Packed and mixed-precision vector instructions: two results from halves or neighbouring registers.

After AMD's CDNA 3 and RDNA 3 ISA documents, VOP3P: the low result takes of each source the part that op_sel names, and
neg_lo negates it; the high one the part that op_sel_hi names, and neg_hi negates it. v_pk_mov_b32 alone has no
op_sel_hi: its low result is source 0's part by op_sel[0], its high one source 1's by op_sel[1].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.rocm.gcn import floats
from tests.rocm.gcn.disassembly import Instruction
from tests.rocm.gcn.errors import UnknownInstruction
from tests.rocm.gcn.operands import constant, parse_register, register, vector_reader, vector_writer
from tests.rocm.gcn.vector import bit_list, canonical, check_modifiers
from tests.rocm.gcn.waves import Waves

Run = Callable[[Waves], None]
Reader = Callable[[Waves], np.ndarray]
MODIFIERS = {"op_sel", "op_sel_hi", "neg_lo", "neg_hi", "clamp"}


def _negated(read: Reader, negate: int) -> Reader:
    return (lambda waves: -read(waves)) if negate else read


def _half_reader(text: str, kind: str, high: int, negate: int) -> Reader:
    """One 16-bit half of a packed operand."""
    if negate and kind != "f16":
        raise UnknownInstruction(f"negation of an operand of type {kind}")
    if parse_register(text) is None:
        # numbers with a point are float16 in float16 instructions, float32 in integer ones; others 32-bit integers
        bits = constant(text, 16) if "." in text and kind == "f16" else constant(text, 32)
        value = np.array([[(bits >> 16 if high else bits) & 0xFFFF]], np.uint16)
        typed = value.view({"f16": np.float16, "u16": np.uint16, "i16": np.int16}[kind])
        return _negated(lambda waves: typed, negate)
    return _negated(vector_reader(text, kind, high=bool(high)), negate)


def _register_reader(text: str, high: int, negate: int) -> Reader:
    """One of the two float32 registers of a packed operand."""
    found = parse_register(text)
    if found is None:
        if high:
            raise UnknownInstruction(f"the upper half of constant {text!r} as float32")
        return _negated(vector_reader(text, "f32"), negate)
    return _negated(vector_reader(f"{found.file}{found.index + high}", "f32"), negate)


HALVES: dict[str, tuple[str, int, Callable[..., np.ndarray]]] = {
    "v_pk_fma_f16": ("f16", 3, floats.fma),
    "v_pk_add_f16": ("f16", 2, lambda a, b: a + b),
    "v_pk_mul_f16": ("f16", 2, lambda a, b: a * b),
    "v_pk_max_f16": ("f16", 2, floats.maximum),
    "v_pk_min_f16": ("f16", 2, floats.minimum),
    "v_pk_add_u16": ("u16", 2, lambda a, b: a + b),
    "v_pk_sub_u16": ("u16", 2, lambda a, b: a - b),
    "v_pk_sub_i16": ("u16", 2, lambda a, b: a - b),
    "v_pk_add_i16": ("u16", 2, lambda a, b: a + b),
    "v_pk_mul_lo_u16": ("u16", 2, lambda a, b: a * b),
    "v_pk_mad_u16": ("u16", 3, lambda a, b, c: a * b + c),
    "v_pk_lshlrev_b16": ("u16", 2, lambda count, a: a << (count & np.uint16(15))),
    "v_pk_lshrrev_b16": ("u16", 2, lambda count, a: a >> (count & np.uint16(15))),
    "v_pk_max_u16": ("u16", 2, np.maximum),
    "v_pk_min_u16": ("u16", 2, np.minimum),
    "v_pk_max_i16": ("i16", 2, np.maximum),
    "v_pk_min_i16": ("i16", 2, np.minimum),
}
SINGLES: dict[str, tuple[int, Callable[..., np.ndarray]]] = {
    "v_pk_fma_f32": (3, floats.fma),
    "v_pk_mul_f32": (2, lambda a, b: a * b),
    "v_pk_add_f32": (2, lambda a, b: a + b),
}


def _selects(instruction: Instruction, count: int) -> list[tuple[int, int, int, int]]:
    """For each source: the part for the low result, for the high one, and whether each is negated."""
    lists = (
        bit_list(instruction, "op_sel", count),
        bit_list(instruction, "op_sel_hi", count, default=1),
        bit_list(instruction, "neg_lo", count),
        bit_list(instruction, "neg_hi", count),
    )
    return list(zip(*lists, strict=True))


def _packed_halves(instruction: Instruction, target: str) -> Run:
    check_modifiers(instruction, MODIFIERS - {"clamp"})
    kind, count, function = HALVES[canonical(instruction.mnemonic)]
    texts, selects = instruction.operands[1 : 1 + count], _selects(instruction, count)
    low = [_half_reader(t, kind, s[0], s[2]) for t, s in zip(texts, selects, strict=True)]
    high = [_half_reader(t, kind, s[1], s[3]) for t, s in zip(texts, selects, strict=True)]
    write = vector_writer(instruction.operands[0], "u32")

    def run(waves: Waves) -> None:
        results = [np.ascontiguousarray(function(*(read(waves) for read in part))) for part in (low, high)]
        first, second = (part.view(np.uint16).astype(np.uint32) for part in results)
        write(waves, first | second << np.uint32(16))

    return run


def _packed_singles(instruction: Instruction, target: str) -> Run:
    check_modifiers(instruction, MODIFIERS - {"clamp"})
    count, function = SINGLES[canonical(instruction.mnemonic)]
    texts, selects = instruction.operands[1 : 1 + count], _selects(instruction, count)
    low = [_register_reader(t, s[0], s[2]) for t, s in zip(texts, selects, strict=True)]
    high = [_register_reader(t, s[1], s[3]) for t, s in zip(texts, selects, strict=True)]
    return _pair_of(
        instruction,
        lambda waves: function(*(read(waves) for read in low)),
        lambda waves: function(*(read(waves) for read in high)),
    )


def _packed_move(instruction: Instruction, target: str) -> Run:
    """v_pk_mov_b32: op_sel_hi, which assemblers print where it is not all ones, has no say."""
    check_modifiers(instruction, {"op_sel", "op_sel_hi"})
    parts = bit_list(instruction, "op_sel", 2)
    first, second = (_register_reader(t, part, 0) for t, part in zip(instruction.operands[1:3], parts, strict=True))
    return _pair_of(instruction, first, second)


def _pair_of(instruction: Instruction, first: Reader, second: Reader) -> Run:
    """Two float32 results into neighbouring registers; both are read before either is written."""
    destination = register(instruction.operands[0])

    def run(waves: Waves) -> None:
        low, high = np.array(first(waves)), np.array(second(waves))
        waves.set_v(destination.index, low.view(np.uint32))
        waves.set_v(destination.index + 1, high.view(np.uint32))

    return run


def _mix(instruction: Instruction, target: str) -> Run:
    """v_fma_mix_f32, mixlo, mixhi: each source is float32, or a float16 half as op_sel_hi and op_sel say."""
    check_modifiers(instruction, {"op_sel", "op_sel_hi"})
    name = canonical(instruction.mnemonic)
    is_half, half = bit_list(instruction, "op_sel_hi", 3), bit_list(instruction, "op_sel", 3)
    readers = [
        vector_reader(text, "f16" if is_half[i] else "f32", high=bool(is_half[i] and half[i]))
        for i, text in enumerate(instruction.operands[1:4])
    ]
    kind = "f32" if name == "v_fma_mix_f32" else "f16"
    write = vector_writer(instruction.operands[0], kind, high=name == "v_fma_mixhi_f16")

    def run(waves: Waves) -> None:
        a, b, c = (read(waves).astype(np.float32) for read in readers)
        write(waves, floats.fma(a, b, c).astype(np.float32 if kind == "f32" else np.float16))

    return run


def _bit_operation(instruction: Instruction, target: str) -> Run:
    """v_bitop3: any function of three bits, given as the eight results of its truth table."""
    check_modifiers(instruction, {"bitop3"})
    kind = "u32" if canonical(instruction.mnemonic).endswith("b32") else "u16"
    table = int(instruction.modifier("bitop3", "0"), 0)
    sources = [vector_reader(text, kind) for text in instruction.operands[1:4]]
    write = vector_writer(instruction.operands[0], kind, clear_high=True)

    def run(waves: Waves) -> None:
        a, b, c = (read(waves) for read in sources)
        result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), a.dtype)
        for index in range(8):
            if table >> index & 1:
                result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
        write(waves, result)

    return run


PACKED_OPS: dict[str, Callable[[Instruction, str], Run]] = {
    **dict.fromkeys(HALVES, _packed_halves),
    **dict.fromkeys(SINGLES, _packed_singles),
    "v_pk_mov_b32": _packed_move,
    **dict.fromkeys(("v_fma_mix_f32", "v_fma_mixlo_f16", "v_fma_mixhi_f16"), _mix),
    **dict.fromkeys(("v_bitop3_b32", "v_bitop3_b16"), _bit_operation),
}
