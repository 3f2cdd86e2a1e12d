"""Small JSON files in a shared folder, by which processes on several machines tell each other where they are.

A record is overwritten in its place: its reader has the old value or the new one, and knows a mixture of both by its
checksum. No locks, no clocks, no list of a folder: of what network file systems do not promise nothing is needed but
that a file that is opened is the one that was last closed.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Overwrite a record. Raises OSError, also if its folder is not there (any more)."""
    body = json.dumps(value, separators=(",", ":")).encode()
    data = b"%08x %d\n" % (zlib.crc32(body), len(body)) + body
    with _opened(path) as stream:
        stream.write(data)  # in one go: it is not buffered


def read(path: Path) -> dict[str, Any] | None:
    """A record; None if there is none, or if it is just being written: ask again. Raises OSError."""
    with _opened(path) as stream:
        head, _, body = stream.read().partition(b"\n")
    try:
        checksum, length = head.split(b" ")
        body = body[: int(length)]
        if len(body) == int(length) and zlib.crc32(body) == int(checksum, 16):
            value = json.loads(body)
            return value if isinstance(value, dict) else None
    except (ValueError, RecursionError):
        pass
    return None


def _opened(path: Path) -> Any:
    # made if need be, also to read: NFS remembers for a minute that a name was not there, unless it is to be made
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b", buffering=0)
