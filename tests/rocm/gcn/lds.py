"""LDS: the workgroup's own memory, with an owner for every part of it, and the instructions on it.

Between two barriers, a part that one wave writes belongs to it: another wave that touches it has a race, and so has a
wave that writes what another has read. Several waves may write one and the same value. Bytes that nobody wrote must
not be read.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.rocm.gcn.disassembly import Instruction
from tests.rocm.gcn.errors import MemoryFault, RaceError, UninitializedRead, UnknownInstruction
from tests.rocm.gcn.operands import register, vector_reader
from tests.rocm.gcn.vector import check_modifiers
from tests.rocm.gcn.waves import Waves

NOBODY, SEVERAL = -1, -2


class LocalMemory:
    """LDS of a batch of workgroups: `size` bytes each, tracked in units of `unit` bytes."""

    def __init__(self, workgroups: int, size: int, unit: int, waves_per_workgroup: int, seed: int) -> None:
        self.size, self.unit = size, unit
        self.stride = -(-size // 16) * 16 + 16
        random = np.random.default_rng(seed)
        self.bytes = random.integers(0, 256, workgroups * self.stride, dtype=np.uint8)
        self.written = np.zeros(self.bytes.size // unit, bool)
        self.tracks = waves_per_workgroup > 1
        self.epoch = np.zeros(workgroups, np.int32)  # barriers passed
        units = self.bytes.size // unit if self.tracks else 0
        self.writer = np.full(units, NOBODY, np.int32)
        self.writer_epoch = np.zeros(units, np.int32)
        self.reader = np.full(units, NOBODY, np.int32)
        self.reader_epoch = np.zeros(units, np.int32)

    def locate(self, waves: Waves, address: np.ndarray, width: int, what: Instruction) -> tuple[np.ndarray, ...]:
        """(positions in `bytes`, wave numbers, workgroups) of the lanes that execute."""
        address = np.broadcast_to(address, waves.mask.shape)
        if waves.full:
            flat, wave = address.ravel().astype(np.int64), np.repeat(np.arange(waves.count), waves.lanes)
        else:
            wave, lane = np.nonzero(waves.mask)
            flat = address[wave, lane].astype(np.int64)
        if flat.size and (flat.max() + width > self.size):
            raise MemoryFault(f"{what.text} at {what.address:#x}: LDS address {flat.max()} + {width}, size {self.size}")
        group = waves.workgroup[wave]
        return flat + group * self.stride, waves.number[wave], group

    def units(self, position: np.ndarray, width: int) -> np.ndarray:
        """The tracked units that accesses of `width` bytes touch, [access, unit]."""
        if (position % self.unit).any():
            raise MemoryFault(f"LDS access at a multiple of less than {self.unit} bytes")
        return (position // self.unit)[:, None] + np.arange(max(width // self.unit, 1))

    def read(self, waves: Waves, address: np.ndarray, width: int, what: Instruction) -> tuple[np.ndarray, np.ndarray]:
        """(bytes [access, width], units) for the lanes that execute."""
        position, number, group = self.locate(waves, address, width, what)
        units = self.units(position, width)
        if not self.written[units].all():
            bad = position[~self.written[units].all(axis=1)][0] % self.stride
            raise UninitializedRead(f"{what.text} at {what.address:#x} reads LDS byte {bad}, which nobody wrote")
        if self.tracks:
            self._note_read(units, number[:, None], self.epoch[group][:, None], what)
        return self.bytes[position[:, None] + np.arange(width)], units

    def write(self, waves: Waves, address: np.ndarray, data: np.ndarray, what: Instruction) -> None:
        """Write `data` (uint8 [wave, lane, width]) in the lanes that execute."""
        width = data.shape[-1]
        position, number, group = self.locate(waves, address, width, what)
        if not len(position):
            return
        units = self.units(position, width)
        place = position[:, None] + np.arange(width)
        chosen = data.reshape(-1, width) if waves.full else data[waves.mask]
        if not self.tracks:
            self.bytes[place] = chosen
            self.written[units] = True
            return
        number, epoch = number[:, None], self.epoch[group][:, None]
        wrote = (self.writer_epoch[units] == epoch) & (self.writer[units] != number) & (self.writer[units] != NOBODY)
        read = (self.reader_epoch[units] == epoch) & (self.reader[units] != number) & (self.reader[units] != NOBODY)
        clash = read | wrote & ~self._agree(place, chosen, units)
        self.bytes[place] = chosen
        self.written[units] = True
        self.writer[units], self.writer_epoch[units] = np.where(wrote, SEVERAL, number), epoch
        others = self.writer[units] != np.where(wrote, SEVERAL, number)  # in this very instruction
        clash |= others & ~self._agree(place, chosen, units)
        if clash.any():
            raise RaceError(
                f"{what.text} at {what.address:#x} writes LDS that another wave touches with no barrier between"
            )
        if others.any():
            self.writer[units[others]] = SEVERAL

    def _agree(self, place: np.ndarray, data: np.ndarray, units: np.ndarray) -> np.ndarray:
        """Which units hold the very bytes of `data`: waves that write the same value do no harm."""
        return (self.bytes[place] == data).reshape(*units.shape, -1).all(axis=2)

    def _note_read(self, units: np.ndarray, number: np.ndarray, epoch: np.ndarray, what: Instruction) -> None:
        if (
            (self.writer_epoch[units] == epoch) & (self.writer[units] != number) & (self.writer[units] != NOBODY)
        ).any():
            raise RaceError(
                f"{what.text} at {what.address:#x} reads LDS that another wave wrote with no barrier between"
            )
        number, epoch = np.broadcast_to(number, units.shape), np.broadcast_to(epoch, units.shape)
        seen = (self.reader_epoch[units] == epoch) & (self.reader[units] != NOBODY)
        value = np.where(seen & (self.reader[units] != number), SEVERAL, number)
        self.reader[units], self.reader_epoch[units] = value, epoch
        mixed = self.reader[units] != value  # several waves in this very instruction
        if mixed.any():
            self.reader[units[mixed]] = SEVERAL

    def barrier(self, workgroups: np.ndarray) -> None:
        """These workgroups passed a barrier."""
        self.epoch[workgroups] += 1


WIDTHS = {"b8": 1, "u8": 1, "i8": 1, "b16": 2, "u16": 2, "i16": 2, "b32": 4, "b64": 8, "b96": 12, "b128": 16}
NAME = re.compile(
    r"^ds_(?P<kind>read|load|write|store)(?P<two>2st64|2|_2addr_stride64|_2addr)?_(?P<type>[biu]\d+)"
    r"(?P<d16>_d16)?(?P<hi>_d16_hi|_hi)?$"
)


def unit_of(instructions: list[Instruction]) -> int:
    """Bytes in which a kernel's LDS is tracked: 4, or less where it has smaller accesses."""
    widths = [WIDTHS[m["type"]] for i in instructions if (m := NAME.match(i.mnemonic)) and m["type"] in WIDTHS]
    return min([4, *widths])


def build(instruction: Instruction, local: Callable[[], LocalMemory]) -> Callable[[Waves], None]:
    """An LDS read, write or permute as a function of the waves."""
    name = instruction.mnemonic
    if name in ("ds_bpermute_b32", "ds_permute_b32"):
        return _permute(instruction)
    if name == "ds_swizzle_b32":
        return _swizzle(instruction)
    match = NAME.match(name)
    if match is None or match["type"] not in WIDTHS:
        raise UnknownInstruction(instruction.text)
    check_modifiers(instruction, {"offset", "offset0", "offset1"})
    if match["two"]:
        scale = WIDTHS[match["type"]] * (64 if "64" in match["two"] else 1)
        offsets = [int(instruction.modifier(f"offset{i}", "0"), 0) * scale for i in (0, 1)]
    else:
        offsets = [int(instruction.modifier("offset", "0"), 0)]
    if match["kind"] in ("read", "load"):
        return _read(instruction, match, offsets, local)
    return _write(instruction, match, offsets, local)


def _read(instruction: Instruction, match: re.Match[str], offsets: list[int], local: Callable[[], LocalMemory]):
    destination, address = register(instruction.operands[0]), vector_reader(instruction.operands[1], "u32")
    width, signed = WIDTHS[match["type"]], match["type"].startswith("i")
    high, half = "_hi" in (match["hi"] or ""), bool(match["d16"]) or bool(match["hi"])

    def run(waves: Waves) -> None:
        memory, base, index = local(), address(waves), destination.index
        loaded = [memory.read(waves, base + np.uint32(offset), width, instruction)[0] for offset in offsets]
        for data in loaded:
            for words in _words(data, signed):
                place_loaded(waves, destination.file, index, words, half, high)
                index += 1

    return run


def _words(data: np.ndarray, signed: bool) -> list[np.ndarray]:
    """Loaded bytes [access, width] as registers, uint32 [access] each."""
    width = data.shape[1]
    if width >= 4:
        return list(np.ascontiguousarray(data).view(np.uint32).T)
    value = np.ascontiguousarray(data).view({1: np.uint8, 2: np.uint16}[width])[:, 0]
    if signed:
        value = value.view({1: np.int8, 2: np.int16}[width]).astype(np.int32).view(np.uint32)
    return [value.astype(np.uint32)]


def place_loaded(waves: Waves, file: str, index: int, words: np.ndarray, half: bool, high: bool) -> None:
    """Write one register from the values of the lanes that execute; `half`: only 16 bits of it."""
    row = getattr(waves, file)[index]
    if half:
        old = row.ravel() if waves.full else row[waves.mask]
        low16 = words & np.uint32(0xFFFF)
        words = low16 << np.uint32(16) | old & np.uint32(0xFFFF) if high else low16 | old & np.uint32(0xFFFF0000)
    if waves.full:
        row[...] = words.reshape(row.shape)
    else:
        row[waves.mask] = words


def _write(instruction: Instruction, match: re.Match[str], offsets: list[int], local: Callable[[], LocalMemory]):
    address, width = vector_reader(instruction.operands[0], "u32"), WIDTHS[match["type"]]
    sources = [register(text) for text in instruction.operands[1:]]
    if len(sources) != len(offsets):
        raise UnknownInstruction(instruction.text)
    high = "_hi" in (match["hi"] or "")

    def run(waves: Waves) -> None:
        memory, base = local(), address(waves)
        for source, offset in zip(sources, offsets, strict=True):
            memory.write(waves, base + np.uint32(offset), stored_bytes(waves, source, width, high), instruction)

    return run


def stored_bytes(waves: Waves, source: object, width: int, high: bool) -> np.ndarray:
    """The bytes that a store takes from registers, uint8 [wave, lane, width]."""
    file, index = getattr(waves, source.file), source.index
    if width < 4:
        shifted = file[index] >> np.uint32(16) if high or source.half == "h" else file[index]
        return np.ascontiguousarray(shifted)[..., None].view(np.uint8)[..., :width]
    stacked = np.stack([file[index + i] for i in range(width // 4)], axis=-1)
    return stacked.view(np.uint8)


def _permute(instruction: Instruction) -> Callable[[Waves], None]:
    """ds_bpermute_b32 (read from the lane that the address names) and ds_permute_b32 (write to it)."""
    check_modifiers(instruction, set())
    destination, address = register(instruction.operands[0]), vector_reader(instruction.operands[1], "u32")
    source = vector_reader(instruction.operands[2], "u32")
    backward = instruction.mnemonic == "ds_bpermute_b32"

    def run(waves: Waves) -> None:
        lane = np.broadcast_to(address(waves) >> np.uint32(2), waves.mask.shape).astype(np.int64) % waves.lanes
        value = np.broadcast_to(source(waves), waves.mask.shape)
        if backward:  # a lane that does not execute gives 0
            moved = np.take_along_axis(np.where(waves.exec, value, np.uint32(0)), lane, axis=1)
        else:
            moved = np.zeros(value.shape, np.uint32)
            wave, from_lane = np.nonzero(waves.mask)
            moved[wave, lane[wave, from_lane]] = value[wave, from_lane]
        waves.set_v(destination.index, moved)

    return run


def _swizzle(instruction: Instruction) -> Callable[[Waves], None]:
    """ds_swizzle_b32 in the form swizzle(SWAP,n) or (XOR-like bit mask) over groups of 32 lanes."""
    destination, source = register(instruction.operands[0]), vector_reader(instruction.operands[1], "u32")
    match = re.search(
        r"offset:swizzle\((SWAP|BITMASK_PERM|BROADCAST|REVERSE),\s*\"?([01pi\d,]+)\"?\)", instruction.text
    )
    if match is None:
        raise UnknownInstruction(instruction.text)
    lane = np.arange(64)
    if match[1] == "SWAP":
        chosen = lane ^ int(match[2])
    elif match[1] == "BITMASK_PERM":
        chosen = lane & ~31
        for bit, letter in enumerate(reversed(match[2])):
            value = {"0": 0, "1": 1, "p": lane >> bit & 1, "i": ~lane >> bit & 1}[letter]
            chosen = chosen | (value << bit)
    elif match[1] == "BROADCAST":
        size, index = (int(part) for part in match[2].split(","))
        chosen = (lane & ~(size - 1)) + index
    else:
        chosen = lane ^ (int(match[2]) - 1)

    def run(waves: Waves) -> None:
        value = np.broadcast_to(source(waves), waves.mask.shape)
        moved = np.where(waves.exec, value, np.uint32(0))[:, chosen[: waves.lanes]]
        waves.set_v(destination.index, moved)

    return run
