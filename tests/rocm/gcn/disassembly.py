"""Machine code to instructions, through llvm-objdump."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

LINE = re.compile(r"^\t(?P<text>.*?)\s*//\s*(?P<address>[0-9A-F]+):(?P<words>(?: [0-9A-F]{8})+)")
LABEL = re.compile(r"^[0-9a-f]+ <(?P<name>[^>]+)>:$")
MODIFIER = re.compile(r"^(?P<name>[a-z_0-9]+)(?::(?P<value>\S+))?$")
NEWEST_KNOWN = 22
OLDEST_ENOUGH = 19  # knows every architecture of the tests


@dataclass(frozen=True)
class Instruction:
    """One instruction: mnemonic and operands as llvm-objdump prints them, modifiers as name to text.

    `second` is the other half of a dual-issue pair (v_dual_… :: v_dual_…).
    """

    address: int
    size: int
    mnemonic: str
    operands: tuple[str, ...]
    modifiers: tuple[tuple[str, str], ...]
    text: str
    second: Instruction | None = None

    def modifier(self, name: str, default: str = "") -> str:
        """The text of a modifier ("1" for a bare flag), or `default`."""
        return dict(self.modifiers).get(name, default)


@functools.lru_cache(maxsize=1)
def objdump() -> str | None:
    """The llvm-objdump to use: FOURBIT_LLVM_OBJDUMP, or the newest that is installed; None if there is none."""
    named = os.environ.get("FOURBIT_LLVM_OBJDUMP")
    if named:
        return named
    for version in range(NEWEST_KNOWN, OLDEST_ENOUGH - 1, -1):
        found = shutil.which(f"llvm-objdump-{version}") or shutil.which(f"/usr/lib/llvm-{version}/bin/llvm-objdump")
        if found:
            return found
    return None


def disassemble(image: bytes, target: str) -> dict[str, list[Instruction]]:
    """The instructions of each symbol of a code object for `target` (for example "gfx1100")."""
    tool = objdump()
    if tool is None:
        raise RuntimeError(f"the emulator needs llvm-objdump, version {OLDEST_ENOUGH} or newer (Debian: llvm-22)")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code.o"
        path.write_bytes(image)
        command = [tool, "-d", f"--mcpu={target}", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return parse(done.stdout)


def parse(listing: str) -> dict[str, list[Instruction]]:
    """The instructions of each symbol in the output of `llvm-objdump -d`."""
    symbols: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in listing.splitlines():
        label = LABEL.match(line)
        if label:
            current = symbols.setdefault(label["name"], [])
            continue
        match = LINE.match(line)
        if match:
            current.append(decode(match["text"], int(match["address"], 16), 4 * len(match["words"].split())))
        elif line.startswith("\t"):
            raise ValueError(f"llvm-objdump printed a line that is not understood: {line!r}")
    return symbols


def decode(text: str, address: int, size: int) -> Instruction:
    """One instruction from its text."""
    first, _, second = text.partition(" :: ")
    mnemonic, _, rest = first.strip().partition(" ")
    operands, modifiers = split_operands(rest.strip())
    other = decode(second, address, size) if second else None
    return Instruction(address, size, mnemonic, operands, modifiers, text, other)


def split_operands(rest: str) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Operands at commas outside brackets; modifiers follow the last operand after a space."""
    pieces, depth, start = [], 0, 0
    for position, letter in enumerate(rest):
        depth += letter in "[({"
        depth -= letter in "])}"
        if letter == "," and depth == 0:
            pieces.append(rest[start:position].strip())
            start = position + 1
    pieces.append(rest[start:].strip())
    tail = pieces.pop().split(" ")
    if tail[0]:
        pieces.append(tail[0])
    modifiers = []
    for word in tail[1:]:
        match = MODIFIER.match(word)
        modifiers.append((match["name"], match["value"] or "1") if match else (word, "1"))
    return tuple(pieces), tuple(modifiers)
