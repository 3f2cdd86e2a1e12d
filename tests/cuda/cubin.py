"""What a cubin says of its kernels: registers, local memory and shared memory, read from the ELF file itself.

pip brings no cuobjdump. The numbers are in the section `.nv.info`, as attributes of a symbol, and in the sizes of
the sections `.nv.shared.NAME`; the tests compare them with the driver's on a GPU.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_FRAME_SIZE, _REGISTERS = 0x11, 0x2F  # EIATTR_FRAME_SIZE, EIATTR_REGCOUNT
_WITH_DATA = 4


@dataclass(frozen=True)
class Usage:
    """Of one kernel: registers a thread, bytes of local memory a thread, bytes of static shared memory a block."""

    registers: int
    frame_bytes: int
    shared_bytes: int


def usage(cubin: bytes) -> dict[str, Usage]:
    """By the kernel's name."""
    sections = dict(_sections(cubin))
    symbols = _symbols(sections)
    found: dict[str, dict[int, int]] = {name[6:]: {} for name in sections if name.startswith(".text.")}
    data = sections[".nv.info"]
    at = 0
    while at < len(data):
        kind, attribute, size = struct.unpack_from("<BBH", data, at)
        at += 4
        if kind != _WITH_DATA:
            continue
        if attribute in (_FRAME_SIZE, _REGISTERS):
            symbol, value = struct.unpack_from("<II", data, at)
            found.setdefault(symbols[symbol], {})[attribute] = value
        at += size
    return {
        name: Usage(values[_REGISTERS], values[_FRAME_SIZE], len(sections.get(f".nv.shared.{name}", b"")))
        for name, values in found.items()
        if f".nv.info.{name}" in sections  # kernels, not the functions that they call
    }


def arch(cubin: bytes) -> int:
    """The arch that an ELF file is for, such as 90."""
    flags, version = struct.unpack_from("<I", cubin, 48)[0], cubin[8]
    return flags >> 8 & 0xFF if version >= 8 else flags & 0xFF


def _sections(cubin: bytes) -> list[tuple[str, bytes]]:
    assert cubin[:4] == b"\x7fELF" and cubin[4] == 2, "a 64-bit ELF file"
    (offset,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, offset + i * size) for i in range(count)]
    names = cubin[headers[names_at][4] :][: headers[names_at][5]]
    nobits = 8  # without content in the file
    return [
        (_text(names, name), bytes(length) if kind == nobits else cubin[start : start + length])
        for name, kind, _, _, start, length, *_ in headers
    ]


def _symbols(sections: dict[str, bytes]) -> list[str]:
    table, names = sections[".symtab"], sections[".strtab"]
    return [_text(names, struct.unpack_from("<I", table, at)[0]) for at in range(0, len(table), 24)]


def _text(names: bytes, at: int) -> str:
    return names[at : names.index(b"\0", at)].decode()
