"""Files given as arguments: no trailing whitespace, one newline at the end, at most 500 kB. Exits 1 with each fault."""

from __future__ import annotations

import sys
from pathlib import Path

MAX_BYTES = 500_000


def faults(path: Path) -> list[str]:
    data = path.read_bytes()
    found = []
    if len(data) > MAX_BYTES:
        found.append(f"{path}: {len(data)} bytes, more than {MAX_BYTES}")
    if data and (not data.endswith(b"\n") or data.endswith(b"\n\n")):
        found.append(f"{path}: does not end in exactly one newline")
    for number, line in enumerate(data.split(b"\n"), 1):
        if line != line.rstrip():
            found.append(f"{path}:{number}: trailing whitespace")
    return found


if __name__ == "__main__":
    everything = [fault for name in sys.argv[1:] for fault in faults(Path(name))]
    print("\n".join(everything), end="\n" if everything else "")
    sys.exit(bool(everything))
