"""Comparisons: v_cmp writes a lane mask, v_cmpx the exec mask."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.rocm.gcn import lanes, sdwa
from tests.rocm.gcn.disassembly import Instruction
from tests.rocm.gcn.errors import UnknownInstruction
from tests.rocm.gcn.operands import register, vector_reader
from tests.rocm.gcn.vector import bit_list, canonical, check_modifiers
from tests.rocm.gcn.waves import Waves

Run = Callable[[Waves], None]
NAME = re.compile(r"^v_cmpx?_(?P<relation>[a-z]+)_(?P<kind>[fiu](?:16|32|64))$")


def _ordered(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a == a) & (b == b)


RELATIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "lt": lambda a, b: a < b,
    "eq": lambda a, b: a == b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "ne": lambda a, b: a != b,
    "lg": lambda a, b: (a < b) | (a > b),
    "o": _ordered,
    "u": lambda a, b: ~_ordered(a, b),
    "nge": lambda a, b: ~(a >= b),
    "nlg": lambda a, b: ~((a < b) | (a > b)),
    "ngt": lambda a, b: ~(a > b),
    "nle": lambda a, b: ~(a <= b),
    "neq": lambda a, b: ~(a == b),
    "nlt": lambda a, b: ~(a < b),
}


def _classes(value: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """v_cmp_class: bits of `wanted` are signalling NaN, quiet NaN, -inf, -normal, -denormal, -0, +0, …, +inf."""
    bits = value.dtype.itemsize * 8
    raw = np.ascontiguousarray(value).view({16: np.uint16, 32: np.uint32}[bits])
    fraction = {16: 10, 32: 23}[bits]
    quiet = (raw >> raw.dtype.type(fraction - 1)) & raw.dtype.type(1) != 0
    negative, nan, infinite, zero = np.signbit(value), np.isnan(value), np.isinf(value), value == 0
    denormal = ~zero & (np.abs(value) < np.finfo(value.dtype).smallest_normal)
    side = [(infinite, 2), (~(nan | infinite | zero | denormal), 3), (denormal, 4), (zero, 5)]
    result = np.where(nan, np.where(quiet, (wanted >> np.uint32(1)) & np.uint32(1), wanted & np.uint32(1)), 0)
    for member, below in side:
        bit = np.where(negative, below, 11 - below).astype(np.uint32)
        result = result | (member & ~nan & (((wanted >> bit) & np.uint32(1)) != 0))
    return result != 0


def build(instruction: Instruction, target: str) -> Run:
    """A comparison as a function of the waves."""
    check_modifiers(instruction, {"op_sel", *sdwa.MODIFIERS, *lanes.MODIFIERS} - {"dst_sel", "dst_unused"})
    name = canonical(instruction.mnemonic)
    writes_exec = name.startswith("v_cmpx")
    operands = list(instruction.operands)
    destination = None if writes_exec and len(operands) == 2 else register(operands.pop(0))
    match = NAME.match(name)
    class_of = re.match(r"^v_cmpx?_class_(f16|f32)$", name)
    if class_of:
        kinds, relation = (class_of[1], "u32"), _classes
    elif match and match["relation"] in RELATIONS:
        kinds, relation = (match["kind"], match["kind"]), RELATIONS[match["relation"]]
    else:
        raise UnknownInstruction(instruction.text)
    if len(operands) != 2 or lanes.used(instruction):
        raise UnknownInstruction(instruction.text)
    select = bit_list(instruction, "op_sel", 2)
    if sdwa.used(instruction):
        a, b = (sdwa.reader(instruction, text, kinds[i], i) for i, text in enumerate(operands))
    else:
        a, b = (vector_reader(text, kinds[i], high=bool(select[i])) for i, text in enumerate(operands))

    def run(waves: Waves) -> None:
        result = np.broadcast_to(relation(a(waves), b(waves)), waves.mask.shape) & waves.mask
        if destination is not None and destination.file == "s":
            waves.set_mask_at(destination.index, result)
        if writes_exec:
            waves.set_exec(result)

    return run
