"""Operands: from llvm-objdump's text to functions that read and write a batch of waves.

Values are numpy arrays: [wave, lane] from vector registers, [wave, 1] from scalar ones and [1, 1] from constants in
vector instructions; [wave] and [1] in scalar instructions. A type is one of `TYPES`, or "m" for a lane mask.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.rocm.gcn.errors import UnknownInstruction
from tests.rocm.gcn.waves import M0, NULL, TTMP, VCC, Waves

Reader = Callable[[Waves], np.ndarray]
Writer = Callable[[Waves, np.ndarray], None]

TYPES: dict[str, tuple[type, int]] = {
    "u16": (np.uint16, 16),
    "i16": (np.int16, 16),
    "f16": (np.float16, 16),
    "u32": (np.uint32, 32),
    "i32": (np.int32, 32),
    "f32": (np.float32, 32),
    "u64": (np.uint64, 64),
    "i64": (np.int64, 64),
    "f64": (np.float64, 64),
}
FLOATS = {16: np.float16, 32: np.float32, 64: np.float64}
UINTS = {16: np.uint16, 32: np.uint32, 64: np.uint64}
REGISTER = re.compile(r"^(?P<file>v|s|a|ttmp)(?:(?P<one>\d+)|\[(?P<first>\d+):(?P<last>\d+)\])(?:\.(?P<half>[lh]))?$")
NAMED = {"vcc": (VCC, 2), "vcc_lo": (VCC, 1), "vcc_hi": (VCC + 1, 1), "m0": (M0, 1), "null": (NULL, 1)}
EXEC = {"exec": 2, "exec_lo": 1}
INVERSE_TWO_PI = {16: 0x3118, 32: 0x3E22F983, 64: 0x3FC45F306DC9C882}


class Register:
    """A parsed register operand: file "v", "a", "s" or "exec", first index, count, and half ("", "l" or "h")."""

    def __init__(self, file: str, index: int, count: int, half: str = "") -> None:
        self.file, self.index, self.count, self.half = file, index, count, half


def parse_register(text: str) -> Register | None:
    """The register that an operand names, or None if it is a constant."""
    if text in NAMED:
        return Register("s", *NAMED[text])
    if text in EXEC:
        return Register("exec", 0, EXEC[text])
    match = REGISTER.match(text)
    if match is None:
        return None
    first = int(match["one"] or match["first"])
    count = 1 if match["one"] else int(match["last"]) - first + 1
    if match["file"] == "ttmp":
        return Register("s", TTMP + first, count)
    return Register(match["file"], first, count, match["half"] or "")


def register(text: str) -> Register:
    """As `parse_register`; raises UnknownInstruction for anything else."""
    found = parse_register(text)
    if found is None:
        raise UnknownInstruction(f"operand {text!r} is no register")
    return found


def constant(text: str, bits: int) -> int:
    """The bits of a constant operand, as an instruction with `bits`-wide operands sees it."""
    if re.fullmatch(r"-?\d+\.\d+(e[+-]?\d+)?", text):
        if text.startswith("0.159154"):
            return INVERSE_TWO_PI[bits]
        return int(np.array(float(text), FLOATS[bits]).view(UINTS[bits]))
    try:
        value = int(text, 0)
    except ValueError as error:
        raise UnknownInstruction(f"operand {text!r} is not known") from error
    return value & ((1 << bits) - 1)


# ---- vector instructions ------------------------------------------------------------------------------------------


def vector_reader(text: str, kind: str, high: bool = False) -> Reader:
    """Reads an operand of a vector instruction, source modifiers included; `high` selects the upper 16 bits."""
    if kind == "m":
        return mask_reader(text)
    negate, absolute, sign_extend, text = _source_modifiers(text)
    read = _plain_vector_reader(text, kind, high)
    if sign_extend:
        raise UnknownInstruction("sext() outside a sub-dword operand")
    if not (negate or absolute):
        return read
    if kind[0] == "i":
        raise UnknownInstruction(f"source modifier on an operand of type {kind}")
    uint, bits = UINTS[TYPES[kind][1]], TYPES[kind][1]
    sign, kind_type = uint(1 << (bits - 1)), TYPES[kind][0]

    def modified(waves: Waves) -> np.ndarray:
        value = read(waves).view(uint)
        if absolute:
            value = value & ~sign
        if negate:
            value = value ^ sign
        return value.view(kind_type)

    return modified


def _source_modifiers(text: str) -> tuple[bool, bool, bool, str]:
    negate = absolute = sign_extend = False
    match = re.fullmatch(r"sext\((.*)\)", text)
    if match:
        sign_extend, text = True, match[1]
    match = re.fullmatch(r"neg\((.*)\)", text)
    if match:
        negate, text = True, match[1]
    elif re.fullmatch(r"-[|vas].*", text):
        negate, text = True, text[1:]
    match = re.fullmatch(r"\|(.*)\||abs\((.*)\)", text)
    if match:
        absolute, text = True, match[1] or match[2]
    return negate, absolute, sign_extend, text


def _plain_vector_reader(text: str, kind: str, high: bool) -> Reader:
    dtype, bits = TYPES[kind]
    found = parse_register(text)
    if found is None:
        if high:
            raise UnknownInstruction(f"the upper half of constant {text!r}")
        value = np.array([[constant(text, bits)]], UINTS[bits]).view(dtype)
        return lambda waves: value
    index, word = found.index, bits == 64
    high = high or found.half == "h"
    if found.file in "va":
        if word:
            return lambda waves: _join(getattr(waves, found.file), index).view(dtype)
        if bits == 16:
            # a strided view of the halves, little-endian
            half = int(high)
            return lambda waves: getattr(waves, found.file)[index].view(dtype)[:, half::2]
        if found.file == "v":
            return lambda waves: waves.v[index].view(dtype)
        return lambda waves: waves.a[index].view(dtype)
    if found.file == "exec":
        if word:
            return lambda waves: _exec_words(waves)[:, None].view(dtype)
        return lambda waves: waves.pack(waves.exec)[:, :1].view(dtype)
    if word:
        return lambda waves: _join(waves.s, index)[:, None].view(dtype)
    if bits == 16:
        shift = np.uint32(16 * high)
        return lambda waves: (waves.s[index] >> shift).astype(np.uint16)[:, None].view(dtype)
    return lambda waves: waves.s[index][:, None].view(dtype)


def _join(file: np.ndarray, index: int) -> np.ndarray:
    return file[index].astype(np.uint64) | (file[index + 1].astype(np.uint64) << np.uint64(32))


def _exec_words(waves: Waves) -> np.ndarray:
    words = waves.pack(waves.exec).astype(np.uint64)
    return words[:, 0] if waves.words == 1 else words[:, 0] | words[:, 1] << np.uint64(32)


def mask_reader(text: str) -> Reader:
    """Reads a lane mask as bool [wave, lane] (or [1, 1] from a constant 0 or -1)."""
    found = parse_register(text)
    if found is None:
        if text not in ("0", "-1"):
            raise UnknownInstruction(f"lane mask {text!r}")
        value = np.array([[text == "-1"]])
        return lambda waves: value
    if found.file == "exec":
        return lambda waves: waves.exec
    index = found.index
    return lambda waves: waves.mask_at(index)


def vector_writer(text: str, kind: str, high: bool = False, clear_high: bool = False) -> Writer:
    """Writes a result in the lanes that execute. 16-bit results keep the other half, or clear it."""
    found = register(text)
    index, half = found.index, found.half
    if kind == "m":
        return lambda waves, value: waves.set_mask_at(index, value & waves.mask)
    if found.file == "a":
        return _accumulator_writer(index)
    if found.file != "v":
        raise UnknownInstruction(f"vector result in {text!r}")
    bits = TYPES[kind][1]
    if bits == 32:
        return lambda waves, value: waves.set_v(index, value.view(np.uint32))
    if bits == 64:

        def write_pair(waves: Waves, value: np.ndarray) -> None:
            value = value.view(np.uint64)
            waves.set_v(index, value.astype(np.uint32))
            waves.set_v(index + 1, (value >> np.uint64(32)).astype(np.uint32))

        return write_pair
    high = high or half == "h"

    def write_half(waves: Waves, value: np.ndarray) -> None:
        bits16 = value.view(np.uint16).astype(np.uint32)
        if clear_high and not half:
            waves.set_v(index, bits16)
        elif high:
            waves.set_v(index, bits16 << np.uint32(16) | waves.v[index] & np.uint32(0xFFFF))
        else:
            waves.set_v(index, bits16 | waves.v[index] & np.uint32(0xFFFF0000))

    return write_half


def _accumulator_writer(index: int) -> Writer:
    def write(waves: Waves, value: np.ndarray) -> None:
        np.copyto(waves.a[index], value.view(np.uint32), where=waves.mask)

    return write


# ---- scalar instructions ------------------------------------------------------------------------------------------


def scalar_reader(text: str, kind: str) -> Reader:
    """Reads an operand of a scalar instruction as [wave] or [1]."""
    dtype, bits = TYPES[kind]
    found = parse_register(text)
    if found is None:
        value = np.array([constant(text, bits)], UINTS[bits]).view(dtype)
        return lambda waves: value
    if found.file == "exec":
        if bits == 64:
            return lambda waves: _exec_words(waves).view(dtype)
        return lambda waves: waves.pack(waves.exec)[:, 0].view(dtype)
    if found.file != "s":
        raise UnknownInstruction(f"scalar operand {text!r}")
    index = found.index
    if bits == 64:
        return lambda waves: _join(waves.s, index).view(dtype)
    if bits == 16:
        return lambda waves: waves.s[index].astype(np.uint16).view(dtype)
    return lambda waves: waves.s[index].view(dtype)


def scalar_writer(text: str, kind: str) -> Writer:
    """Writes a scalar result."""
    found, bits = register(text), TYPES[kind][1]
    index = found.index
    if found.file == "exec":

        def write_exec(waves: Waves, value: np.ndarray) -> None:
            words = np.broadcast_to(np.ascontiguousarray(value), (waves.count,)).copy()
            if bits != 32 * waves.words:
                raise UnknownInstruction(f"a {bits}-bit write of exec on waves of {waves.lanes} lanes")
            waves.set_exec(waves.unpack(words.view(np.uint32).reshape(waves.count, waves.words)))

        return write_exec
    if found.file != "s":
        raise UnknownInstruction(f"scalar result in {text!r}")
    if bits == 64:

        def write_pair(waves: Waves, value: np.ndarray) -> None:
            value = value.view(np.uint64)
            waves.set_s(index, value.astype(np.uint32))
            waves.set_s(index + 1, (value >> np.uint64(32)).astype(np.uint32))

        return write_pair
    return lambda waves, value: waves.set_s(index, value.view(np.uint32))
