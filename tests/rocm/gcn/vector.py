"""Vector ALU instructions that are functions of their operands, lane by lane: the tables, and how they are built.

An entry is (result type, source types, function). A source type "d" before a type means that the result register is
read too. `build` adds what any of them may carry: source modifiers, DPP, SDWA, op_sel, clamp.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.rocm.gcn import lanes, sdwa
from tests.rocm.gcn.disassembly import Instruction
from tests.rocm.gcn.errors import UnknownInstruction
from tests.rocm.gcn.operands import TYPES, Reader, vector_reader, vector_writer
from tests.rocm.gcn.vector_float import FLOAT_OPS
from tests.rocm.gcn.vector_integer import INTEGER_OPS
from tests.rocm.gcn.waves import Waves

Compute = Callable[[Waves], np.ndarray]
Commit = Callable[[Waves, np.ndarray], None]
Entry = tuple[str, str, Callable[..., np.ndarray]]

OPS: dict[str, Entry] = {**INTEGER_OPS, **FLOAT_OPS}
COMMON = {"clamp", "op_sel", *lanes.MODIFIERS, *sdwa.MODIFIERS}


def canonical(mnemonic: str) -> str:
    """A vector mnemonic without its encoding."""
    for suffix in ("_e32", "_e64", "_dpp", "_sdwa", "_e64_dpp"):
        mnemonic = mnemonic.removesuffix(suffix)
    return mnemonic


def check_modifiers(instruction: Instruction, known: set[str]) -> None:
    """Raise UnknownInstruction for a modifier that the caller does not implement."""
    unknown = {name for name, _ in instruction.modifiers} - known
    if unknown:
        raise UnknownInstruction(f"{instruction.text}: modifier {', '.join(sorted(unknown))}")


def bit_list(instruction: Instruction, name: str, count: int, default: int = 0) -> list[int]:
    """A modifier such as op_sel:[0,1,0] as a list of `count` bits."""
    text = instruction.modifier(name)
    values = [int(digit) for digit in text.strip("[]").split(",")] if text else []
    return values + [default] * (count - len(values))


def build_parts(instruction: Instruction, target: str) -> tuple[Compute, Commit]:
    """What computes the instruction's result, and what writes it."""
    name = canonical(instruction.mnemonic)
    if name not in OPS:
        raise UnknownInstruction(instruction.text)
    result, sources, function = OPS[name]
    check_modifiers(instruction, COMMON)
    kinds = sources.split()
    texts = list(instruction.operands[1:])
    if kinds and kinds[-1].startswith("d"):
        texts.append(instruction.operands[0])
    if len(texts) != len(kinds):
        raise UnknownInstruction(f"{instruction.text}: {len(texts)} sources, want {len(kinds)}")
    select = bit_list(instruction, "op_sel", len(kinds) + 1)
    readers: list[Reader] = []
    for position, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        kind = kind.removeprefix("d")
        if sdwa.used(instruction) and position < 2 and position < len(instruction.operands) - 1:
            readers.append(sdwa.reader(instruction, text, kind, position))
        else:
            readers.append(vector_reader(text, kind, high=bool(select[position])))
    compute = _apply(function, readers)
    if instruction.modifier("clamp"):
        compute = _clamped(compute) if result[0] == "f" else _saturated(name, result, readers)
    write_high = bool(select[len(instruction.operands) - 1])
    commit = vector_writer(instruction.operands[0], result, write_high, clear_high=target.startswith("gfx9"))
    if sdwa.used(instruction):
        commit = sdwa.writer(instruction, result)
    if lanes.used(instruction):
        shifted = lanes.dpp_reader(instruction, texts[0], kinds[0].removeprefix("d"))
        return _with_dpp(function, readers, shifted), lambda waves, pair: _commit_dpp(waves, pair, commit)
    return compute, commit


def _apply(function: Callable[..., np.ndarray], readers: list[Reader]) -> Compute:
    if len(readers) == 1:
        (one,) = readers
        return lambda waves: function(one(waves))
    if len(readers) == 2:
        first, second = readers
        return lambda waves: function(first(waves), second(waves))
    if len(readers) == 3:
        first, second, third = readers
        return lambda waves: function(first(waves), second(waves), third(waves))
    return lambda waves: function(*(read(waves) for read in readers))


EXACT = {"add": np.add, "sub": np.subtract, "subrev": lambda a, b: b - a}


def _saturated(name: str, result: str, readers: list[Reader]) -> Compute:
    """Clamp on an integer addition or subtraction: it saturates."""
    match = re.fullmatch(r"v_(add|sub|subrev)(?:_nc)?_([ui](?:16|32))", name)
    if match is None or len(readers) != 2:
        raise UnknownInstruction(f"clamp on {name}")
    function, kind, raw = EXACT[match[1]], TYPES[match[2]][0], TYPES[result][0]
    limits = np.iinfo(kind)

    def compute(waves: Waves) -> np.ndarray:
        a, b = (read(waves).view(kind).astype(np.int64) for read in readers)
        return np.clip(function(a, b), limits.min, limits.max).astype(kind).view(raw)

    return compute


def _clamped(compute: Compute) -> Compute:
    # NaN clamps to 0, as DX10_CLAMP asks
    return lambda waves: np.clip(np.nan_to_num(compute(waves), nan=0.0, posinf=1.0, neginf=0.0), 0, 1)


def _with_dpp(function: Callable[..., np.ndarray], readers: list[Reader], shifted: lanes.Shifted) -> Compute:
    def compute(waves: Waves) -> tuple[np.ndarray, np.ndarray]:
        first, enabled = shifted(waves)
        return function(first, *(read(waves) for read in readers[1:])), enabled

    return compute


def _commit_dpp(waves: Waves, pair: tuple[np.ndarray, np.ndarray], commit: Commit) -> None:
    value, enabled = pair
    mask, full = waves.mask, waves.full
    waves.mask, waves.full = mask & enabled, False
    commit(waves, value)
    waves.mask, waves.full = mask, full


def build(instruction: Instruction, target: str) -> Callable[[Waves], None]:
    """The instruction as a function of the waves."""
    compute, commit = build_parts(instruction, target)

    def run(waves: Waves) -> None:
        commit(waves, compute(waves))

    return run


def build_pair(instruction: Instruction, target: str) -> Callable[[Waves], None]:
    """A dual-issue pair: both read before either writes."""
    assert instruction.second is not None
    halves = []
    for half in (instruction, instruction.second):
        mnemonic = half.mnemonic.replace("v_dual_", "v_")
        operands = half.operands
        if mnemonic == "v_cndmask_b32" and len(operands) == 3:
            operands = (*operands, "vcc_lo")  # implied
        single = Instruction(half.address, half.size, mnemonic, operands, half.modifiers, half.text)
        halves.append(build_parts(single, target))
    (compute_x, commit_x), (compute_y, commit_y) = halves

    def run(waves: Waves) -> None:
        x, y = compute_x(waves), compute_y(waves)
        commit_x(waves, x)
        commit_y(waves, y)

    return run
