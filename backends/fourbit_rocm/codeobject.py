"""Reads AMDGPU code objects: the ELF file that hipRTC returns, and the metadata in its note.

The layout is documented in LLVM's "User Guide for AMDGPU Backend": the note NT_AMDGPU_METADATA is a MessagePack map
with a list of kernels, and each kernel has a 64-byte descriptor, the symbol NAME.kd.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

NT_AMDGPU_METADATA = 32
SHT_SYMTAB, SHT_NOTE = 2, 7
BUNDLE_MAGIC = b"__CLANG_OFFLOAD_BUNDLE__"


class CodeObjectError(ValueError):
    """The bytes are no AMDGPU code object, or one whose metadata is not understood."""


@dataclass(frozen=True)
class Argument:
    """One kernel argument: its place in the kernarg segment (bytes), and its kind as the metadata names it."""

    offset: int
    size: int
    kind: str

    @property
    def hidden(self) -> bool:
        """Whether the runtime fills it, not the caller."""
        return self.kind.startswith("hidden_")


@dataclass(frozen=True)
class KernelInfo:
    """What the metadata says of one kernel. Sizes in bytes; registers per lane (vgprs) or per wave (sgprs)."""

    name: str
    wavefront_size: int
    kernarg_size: int
    lds_size: int
    private_size: int
    sgprs: int
    vgprs: int
    agprs: int
    sgpr_spills: int
    vgpr_spills: int
    max_workgroup_size: int
    arguments: tuple[Argument, ...]
    descriptor: bytes

    @property
    def wgp_mode(self) -> bool:
        """Whether a workgroup's waves may be on both compute units of a workgroup processor; never on CDNA."""
        (rsrc1,) = struct.unpack_from("<I", self.descriptor, 48)
        return bool(rsrc1 >> 29 & 1)

    @property
    def explicit_arguments(self) -> tuple[Argument, ...]:
        """The arguments that the caller passes, in order."""
        return tuple(argument for argument in self.arguments if not argument.hidden)


@dataclass(frozen=True)
class CodeObject:
    """A parsed code object: `target` is the architecture, for example "gfx90a", without features."""

    target: str
    kernels: dict[str, KernelInfo]

    def kernel(self, name: str) -> KernelInfo:
        """The kernel of that name. Raises CodeObjectError, naming those that are there."""
        if name not in self.kernels:
            raise CodeObjectError(f"no kernel {name!r} in the code object; it has {', '.join(sorted(self.kernels))}")
        return self.kernels[name]


def unbundle(image: bytes) -> bytes:
    """The device ELF of a clang offload bundle with one device entry; anything else is returned as it is."""
    if not image.startswith(BUNDLE_MAGIC):
        return image
    (count,) = struct.unpack_from("<Q", image, 24)
    position, found = 32, []
    for _ in range(count):
        offset, size, length = struct.unpack_from("<QQQ", image, position)
        triple = image[position + 24 : position + 24 + length]
        position += 24 + length
        if b"amdgcn" in triple and size:
            found.append(image[offset : offset + size])
    if len(found) != 1:
        raise CodeObjectError(f"the offload bundle holds {len(found)} device images, want 1")
    return found[0]


def parse(image: bytes) -> CodeObject:
    """Read a code object, or a bundle with one. Raises CodeObjectError."""
    image = unbundle(image)
    try:
        return _parse_elf(image)
    except (struct.error, IndexError, KeyError, UnicodeDecodeError) as error:
        raise CodeObjectError(f"damaged code object: {error!r}") from error


def _parse_elf(image: bytes) -> CodeObject:
    if image[:5] != b"\x7fELF\x02" or struct.unpack_from("<H", image, 18)[0] != 0xE0:
        raise CodeObjectError("not an AMDGPU ELF file")
    (start,) = struct.unpack_from("<Q", image, 40)
    entry_size, count = struct.unpack_from("<HH", image, 58)
    # per section: name, type, flags, address, offset, size, link, info, alignment, entry size
    sections = [struct.unpack_from("<IIQQQQIIQQ", image, start + i * entry_size) for i in range(count)]
    metadata: dict[str, Any] | None = None
    for section in sections:
        if section[1] == SHT_NOTE:
            metadata = _metadata_of_note(image[section[4] : section[4] + section[5]]) or metadata
    if metadata is None:
        raise CodeObjectError("the code object has no metadata note")
    descriptors = _descriptors(image, sections)
    kernels = {}
    for raw in metadata["amdhsa.kernels"]:
        info = _kernel(raw, descriptors)
        kernels[info.name] = info
    target = str(metadata.get("amdhsa.target", "")).rpartition("--")[2]
    return CodeObject(target.split(":")[0], kernels)


def _kernel(raw: dict[str, Any], descriptors: dict[str, bytes]) -> KernelInfo:
    arguments = tuple(Argument(a[".offset"], a[".size"], a[".value_kind"]) for a in raw.get(".args", ()))
    return KernelInfo(
        name=raw[".name"],
        wavefront_size=raw[".wavefront_size"],
        kernarg_size=raw[".kernarg_segment_size"],
        lds_size=raw[".group_segment_fixed_size"],
        private_size=raw[".private_segment_fixed_size"],
        sgprs=raw[".sgpr_count"],
        vgprs=raw[".vgpr_count"],
        agprs=raw.get(".agpr_count", 0),
        sgpr_spills=raw.get(".sgpr_spill_count", 0),
        vgpr_spills=raw.get(".vgpr_spill_count", 0),
        max_workgroup_size=raw[".max_flat_workgroup_size"],
        arguments=arguments,
        descriptor=descriptors[raw[".symbol"]],
    )


def _metadata_of_note(data: bytes) -> dict[str, Any] | None:
    position = 0
    while position + 12 <= len(data):
        name_size, size, kind = struct.unpack_from("<III", data, position)
        position += 12
        name = data[position : position + name_size].rstrip(b"\0")
        position += -(-name_size // 4) * 4
        if name == b"AMDGPU" and kind == NT_AMDGPU_METADATA:
            value, _ = _unpack(data[position : position + size], 0)
            return dict(value)
        position += -(-size // 4) * 4
    return None


def _descriptors(image: bytes, sections: list[tuple[int, ...]]) -> dict[str, bytes]:
    """The 64 bytes of each symbol NAME.kd."""
    found = {}
    for section in sections:
        if section[1] != SHT_SYMTAB and section[1] != 11:  # the static or the dynamic symbol table
            continue
        names = sections[section[6]][4]
        for position in range(section[4], section[4] + section[5], 24):
            name, _, _, index, address, _ = struct.unpack_from("<IBBHQQ", image, position)
            text = image[names + name : image.index(b"\0", names + name)].decode()
            if text.endswith(".kd") and 0 < index < len(sections):
                place = sections[index][4] + address - sections[index][3]
                found[text] = image[place : place + 64]
    return found


def _unpack(data: bytes, at: int) -> tuple[Any, int]:
    """One MessagePack value at `at`, and the position after it: the kinds that LLVM writes."""
    tag = data[at]
    at += 1
    if tag < 0x80:
        return tag, at
    if tag >= 0xE0:
        return tag - 256, at
    if tag < 0x90:
        return _unpack_map(data, at, tag & 15)
    if tag < 0xA0:
        return _unpack_list(data, at, tag & 15)
    if tag < 0xC0:
        return data[at : at + (tag & 31)].decode(), at + (tag & 31)
    if tag in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[tag], at
    fixed = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}.get(tag)
    if fixed is not None:
        return struct.unpack_from(fixed, data, at)[0], at + struct.calcsize(fixed)
    sized = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I", 0xDC: ">H", 0xDD: ">I", 0xDE: ">H", 0xDF: ">I"}.get(tag)
    if sized is None:
        raise CodeObjectError(f"metadata: MessagePack tag {tag:#x} is not known")
    (length,) = struct.unpack_from(sized, data, at)
    at += struct.calcsize(sized)
    if tag <= 0xDB:
        return data[at : at + length].decode(), at + length
    return _unpack_list(data, at, length) if tag <= 0xDD else _unpack_map(data, at, length)


def _unpack_list(data: bytes, at: int, length: int) -> tuple[list[Any], int]:
    values = []
    for _ in range(length):
        value, at = _unpack(data, at)
        values.append(value)
    return values, at


def _unpack_map(data: bytes, at: int, length: int) -> tuple[dict[Any, Any], int]:
    values = {}
    for _ in range(length):
        key, at = _unpack(data, at)
        values[key], at = _unpack(data, at)
    return values, at
