"""Files and names that outlast a power cut: written under a temporary name, flushed to the disk, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fourbit.checkpoint.errors import CheckpointError

CHUNK_BYTES = 1 << 22
"""What is hashed, and read or written, at once: small enough for the processor's cache."""


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write to; it is under its name only once all of it is on the disk."""
    with open(temporary(path), "wb") as stream:
        yield stream
        flush_to_disk(stream)
    os.replace(temporary(path), path)


def temporary(path: Path) -> Path:
    """The name of a file until it is complete: hidden, which no file is that is carried over, and never too long."""
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()
    return path.with_name(f".{digest[:16]}.tmp")


def flush_to_disk(stream: IO[bytes]) -> None:
    """Wait until what was written is on the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file, indented as transformers does."""
    with atomic_file(path) as stream:
        stream.write(_json_text(value) + b"\n")


def _json_text(value: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(value, indent=2, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can only hold escaped
        return json.dumps(value, indent=2).encode()


def copy_files(names: Iterable[str], src: Path, dst: Path) -> None:
    """Copy files of `src` by their relative names, with subfolders.

    Raises CheckpointError if one cannot be opened, and OSError if its copy cannot be written.
    """
    for relative in names:
        target = dst / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            read = open(src / relative, "rb")  # noqa: SIM115
        except OSError as error:
            raise CheckpointError(f"the source's {src / relative} cannot be read: {error.strerror or error}") from error
        with read, atomic_file(target) as written:
            shutil.copyfileobj(read, written)


def sync_tree(folder: Path) -> None:
    """`sync_folder` for a folder and all below it."""
    for inner, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(inner))


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # Windows
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems
    finally:
        os.close(descriptor)


def hash_of(stream: IO[bytes], nbytes: int) -> str | None:
    """The SHA-256 of the next bytes of a file, in hexadecimal; None if it has not so many."""
    digest = hashlib.sha256()
    while nbytes:
        chunk = stream.read(min(nbytes, CHUNK_BYTES))
        if not chunk:
            return None
        digest.update(chunk)
        nbytes -= len(chunk)
    return digest.hexdigest()
