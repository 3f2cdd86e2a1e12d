"""Global memory: registered buffers and nothing else; vector and scalar loads, stores and atomics."""

from __future__ import annotations

import bisect
import ctypes
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.rocm.gcn.disassembly import Instruction
from tests.rocm.gcn.errors import MemoryFault, UnknownInstruction
from tests.rocm.gcn.lds import WIDTHS, _words, place_loaded, stored_bytes
from tests.rocm.gcn.operands import constant, parse_register, register, vector_reader
from tests.rocm.gcn.vector import check_modifiers
from tests.rocm.gcn.waves import NULL, Waves


class Memory:
    """The address space of a launch. Addresses are those of this process; only registered ranges may be touched."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ranges: dict[int, tuple[int, np.ndarray, bool, str]] = {}

    def register(self, address: int, size: int, writable: bool = True, name: str = "") -> None:
        """Make `size` bytes at `address` accessible. The caller keeps them alive. Ranges must not overlap."""
        if size == 0:
            return
        place = bisect.bisect_right(self.starts, address)
        after = self.starts[place] if place < len(self.starts) else None
        before = self.starts[place - 1] if place else None
        if (after is not None and address + size > after) or (before is not None and self.ranges[before][0] > address):
            raise ValueError(f"buffer {name!r} overlaps a registered one")
        view = np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)
        self.starts.insert(place, address)
        self.ranges[address] = (address + size, view, writable, name)

    def unregister(self, address: int) -> None:
        """Forget the buffer that starts at `address`."""
        if address in self.ranges:
            self.starts.remove(address)
            del self.ranges[address]

    def find(self, first: int, end: int, writing: bool, what: str) -> tuple[int, np.ndarray]:
        """(address, bytes) of the buffer that holds [first, end). Raises MemoryFault."""
        place = bisect.bisect_right(self.starts, first) - 1
        if place >= 0:
            start = self.starts[place]
            stop, view, writable, name = self.ranges[start]
            if end <= stop and (writable or not writing):
                return start, view
            if first < stop:
                past = "is read only" if end <= stop else f"ends {end - stop} bytes earlier"
                raise MemoryFault(f"{what}: {end - first} bytes at {first:#x}, but buffer {name!r} {past}")
        raise MemoryFault(f"{what}: {end - first} bytes at {first:#x}, where no buffer is registered")

    def gather(self, address: np.ndarray, width: int, what: str) -> np.ndarray:
        """Bytes [access, width] at `address` (uint64 [access])."""
        result = np.empty((len(address), width), np.uint8)
        for chosen, offset, view in self._by_buffer(address, width, False, what):
            if width in (4, 8) and not (offset % width).any() and view.size % width == 0:
                values = view.view({4: np.uint32, 8: np.uint64}[width])[offset // width]
                result[chosen] = values[:, None].view(np.uint8)
            else:
                result[chosen] = view[offset[:, None] + np.arange(width)]
        return result

    def scatter(self, address: np.ndarray, data: np.ndarray, what: str) -> None:
        """Write bytes [access, width]; of lanes that name one address the last wins."""
        width = data.shape[1]
        for chosen, offset, view in self._by_buffer(address, width, True, what):
            view[offset[:, None] + np.arange(width)] = data[chosen]

    def _by_buffer(self, address: np.ndarray, width: int, writing: bool, what: str) -> list[tuple[Any, ...]]:
        if not len(address):
            return []
        low, high = int(address.min()), int(address.max())
        start, view = self.find(low, low + width, writing, what)
        if high + width <= start + view.size:  # all in one buffer, as nearly always
            return [(slice(None), (address - np.uint64(start)).astype(np.int64), view)]
        parts, left = [], np.ones(len(address), bool)
        while left.any():
            first = int(address[left].min())
            start, view = self.find(first, first + width, writing, what)
            inside = left & (address >= np.uint64(start)) & (address < np.uint64(start + view.size))
            self.find(int(address[inside].max()), int(address[inside].max()) + width, writing, what)
            parts.append((inside, (address[inside] - np.uint64(start)).astype(np.int64), view))
            left &= ~inside
        return parts


SIZES = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2}
SIZES |= {"byte": 1, "short": 2, **WIDTHS}
NAME = re.compile(
    r"^(?P<space>global|flat)_(?P<kind>load|store)_(?:(?P<d16>short_d16|d16_b16|d16_hi_b16|short_d16_hi|"
    r"(?:ubyte|sbyte)_d16(?:_hi)?|d16_(?:hi_)?[ui]8|byte_d16_hi|d16_hi_b8)|(?P<type>[a-z]+\d*|dwordx\d))$"
)
CACHE_HINTS = {"glc", "slc", "dlc", "sc0", "sc1", "nt", "th", "scope"}
"""They choose how caches treat an access; there are no caches here."""


def _address_reader(instruction: Instruction, texts: tuple[str, str], space: str) -> Callable[[Waves], np.ndarray]:
    """The byte address per lane, uint64 [wave, lane]: a 64-bit vector address, or a scalar base and 32-bit offsets."""
    offset = np.uint64(int(instruction.modifier("offset", "0"), 0) & 0xFFFFFFFFFFFFFFFF)
    vector, base = texts
    if base in ("off", ""):
        wide = vector_reader(vector, "u64")
        return lambda waves: wide(waves) + offset
    scalar, narrow = vector_reader(base, "u64"), vector_reader(vector, "u32")
    return lambda waves: scalar(waves) + narrow(waves).astype(np.uint64) + offset


def _lanes(waves: Waves, value: np.ndarray) -> np.ndarray:
    value = np.broadcast_to(value, waves.mask.shape)
    return value.ravel() if waves.full else value[waves.mask]


def build_vector(instruction: Instruction, memory: Callable[[], Memory]) -> Callable[[Waves], None]:
    """A global or flat load or store as a function of the waves."""
    if "_atomic_" in instruction.mnemonic:
        return _atomic(instruction, memory)
    match = NAME.match(instruction.mnemonic)
    if match is None:
        raise UnknownInstruction(instruction.text)
    check_modifiers(instruction, {"offset", *CACHE_HINTS})
    what = f"{instruction.text} at {instruction.address:#x}"
    kind, part = match["kind"], match["d16"] or ""
    if part:
        width = 1 if "byte" in part or part.endswith("8") else 2
    elif match["type"] in SIZES:
        width = SIZES[match["type"]]
    else:
        raise UnknownInstruction(instruction.text)
    signed = (
        "sbyte" in instruction.mnemonic
        or "sshort" in instruction.mnemonic
        or bool(re.search(r"_i(8|16)$", instruction.mnemonic))
    )
    high, operands = "_hi" in part, list(instruction.operands)
    if match["space"] == "flat":
        operands.append("off")
    if kind == "load":
        destination = register(operands[0])
        address = _address_reader(instruction, (operands[1], operands[2]), match["space"])

        def load(waves: Waves) -> None:
            data = memory().gather(_lanes(waves, address(waves)), width, what)
            for number, words in enumerate(_words(data, signed)):
                place_loaded(waves, destination.file, destination.index + number, words, bool(part), high)

        return load
    address = _address_reader(instruction, (operands[0], operands[2]), match["space"])
    source = register(operands[1])

    def store(waves: Waves) -> None:
        data = stored_bytes(waves, source, width, high)
        chosen = data.reshape(-1, width) if waves.full else data[waves.mask]
        memory().scatter(_lanes(waves, address(waves)), chosen, what)

    return store


ATOMICS: dict[str, tuple[type, np.ufunc]] = {
    "add": (np.uint32, np.add),
    "add_u32": (np.uint32, np.add),
    "add_f32": (np.float32, np.add),
    "or": (np.uint32, np.bitwise_or),
    "or_b32": (np.uint32, np.bitwise_or),
    "umax": (np.uint32, np.maximum),
    "max_u32": (np.uint32, np.maximum),
    "umin": (np.uint32, np.minimum),
    "min_u32": (np.uint32, np.minimum),
}


def _atomic(instruction: Instruction, memory: Callable[[], Memory]) -> Callable[[Waves], None]:
    """A 32-bit read-modify-write; lanes act one after the other, in lane order."""
    operation = instruction.mnemonic.partition("_atomic_")[2]
    operands = list(instruction.operands)
    if operation not in ATOMICS or not instruction.mnemonic.startswith("global_"):
        raise UnknownInstruction(instruction.text)
    check_modifiers(instruction, {"offset", *CACHE_HINTS})
    dtype, function = ATOMICS[operation]
    returns = len(operands) == 4
    destination = register(operands.pop(0)) if returns else None
    address = _address_reader(instruction, (operands[0], operands[2]), "global")
    source, what = vector_reader(operands[1], "u32"), f"{instruction.text} at {instruction.address:#x}"

    def run(waves: Waves) -> None:
        places, values = _lanes(waves, address(waves)), _lanes(waves, source(waves)).view(dtype)
        before = np.empty(len(places), np.uint32)
        for lane, (place, value) in enumerate(zip(places, values, strict=True)):
            start, view = memory().find(int(place), int(place) + 4, True, what)
            cell = view[int(place) - start : int(place) - start + 4].view(dtype)
            before[lane] = cell.view(np.uint32)[0]
            cell[0] = function(cell[0], value)
        if destination is not None:
            place_loaded(waves, destination.file, destination.index, before, False, False)

    return run


SCALAR_WORDS = {"dword": 1, "b32": 1, "dwordx2": 2, "b64": 2, "b96": 3, "dwordx4": 4, "b128": 4}
SCALAR_WORDS |= {"dwordx8": 8, "b256": 8, "dwordx16": 16, "b512": 16}


def build_scalar(instruction: Instruction, memory: Callable[[], Memory]) -> Callable[[Waves], None]:
    """s_load: consecutive words at a wave's own address."""
    kind = instruction.mnemonic.removeprefix("s_load_")
    if kind not in SCALAR_WORDS and kind not in ("u8", "i8", "u16", "i16"):
        raise UnknownInstruction(instruction.text)
    check_modifiers(instruction, {"offset", *CACHE_HINTS})
    words = SCALAR_WORDS.get(kind, 0)
    destination, base = register(instruction.operands[0]), register(instruction.operands[1])
    offset_text = instruction.operands[2] if len(instruction.operands) > 2 else "0"
    soffset = parse_register(offset_text)
    fixed = int(instruction.modifier("offset", "0"), 0)
    if soffset is None:
        value = constant(offset_text, 32)
        fixed += value - (1 << 32) * (value >> 31)
    what = f"{instruction.text} at {instruction.address:#x}"

    def run(waves: Waves) -> None:
        address = waves.s[base.index].astype(np.uint64) | waves.s[base.index + 1].astype(np.uint64) << np.uint64(32)
        address = address + np.uint64(fixed & 0xFFFFFFFFFFFFFFFF)
        if soffset is not None and soffset.index != NULL:
            address = address + waves.s[soffset.index].astype(np.uint64)
        chosen = np.flatnonzero(waves.active)
        width = 4 * words or WIDTHS[kind]
        if words:
            address = address & ~np.uint64(3)  # the hardware ignores these bits
        data = memory().gather(address[chosen], width, what)
        loaded = np.stack(_words(data, kind.startswith("i")), axis=1)
        for number in range(loaded.shape[1]):
            waves.s[destination.index + number][chosen] = loaded[:, number]

    return run
