"""What a folder is at a moment, so that a later one can tell whether it is still that, and remove nothing else."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fourbit.checkpoint.errors import CheckpointError

Entry = tuple[int, ...]
"""Of a folder: its kind and inode. Of anything else: kind, inode, bytes, mtime_ns and ctime_ns."""


@dataclass(frozen=True)
class Snapshot:
    """A folder and all that is below it; links are not followed.

    Attributes:
        inode: of the folder itself.
        entries: what is in it, by name relative to it, with "/" between components.
    """

    inode: int
    entries: dict[str, Entry]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"inode": self.inode, "entries": {name: list(entry) for name, entry in self.entries.items()}}


def from_json(value: Any) -> Snapshot | None:
    """The snapshot that `to_json` gave; None if it is none."""
    if not isinstance(value, dict) or not isinstance(value.get("entries"), dict):
        return None
    entries = {name: tuple(entry) for name, entry in value["entries"].items() if isinstance(entry, list)}
    if type(value.get("inode")) is not int or len(entries) != len(value["entries"]):
        return None
    return Snapshot(value["inode"], entries)


def take(folder: Path) -> Snapshot:
    """The folder as it is now. Raises CheckpointError if it cannot be looked at."""
    try:
        return Snapshot(_inode(folder), dict(_walk(folder, "")))
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be looked at: {error.strerror or error}") from error


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, Entry]]:
    for name in sorted(os.listdir(folder)):
        found = _entry(folder / name)
        yield prefix + name, found
        if stat.S_ISDIR(found[0]):
            yield from _walk(folder / name, f"{prefix}{name}/")


def _inode(folder: Path) -> int:
    return os.lstat(folder).st_ino


def _entry(path: Path) -> Entry:
    found = os.lstat(path)
    kind = stat.S_IFMT(found.st_mode)
    if stat.S_ISDIR(kind):  # its times change with what is in it, which has entries of its own
        return kind, found.st_ino
    return kind, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def differences(old: Snapshot, folder: Path) -> list[str]:
    """In words, what is not as it was."""
    new = take(folder)
    if new.inode != old.inode:
        return ["it is another folder"]
    found = [f"{name} is new" for name in new.entries if name not in old.entries]
    found += [f"{name} is gone" for name in old.entries if name not in new.entries]
    return found + [
        f"{name} has changed" for name, entry in old.entries.items() if new.entries.get(name, entry) != entry
    ]


def remove(old: Snapshot, folder: Path) -> bool:
    """Remove from a folder what is there as it was, and the folder if nothing else is. Returns whether it is gone."""
    try:
        if _inode(folder) != old.inode:
            return False
        # all are looked at first: with one of two hard links the other one's ctime changes
        same = [name for name, entry in old.entries.items() if _is(folder / name, entry)]
        for name in sorted(same, key=lambda name: len(PurePosixPath(name).parts), reverse=True):
            if not stat.S_ISDIR(old.entries[name][0]):
                os.unlink(folder / name)
            elif not os.listdir(folder / name):
                os.rmdir(folder / name)
        os.rmdir(folder)
    except OSError:
        return False
    return True


def _is(path: Path, entry: Entry) -> bool:
    try:
        return _entry(path) == entry
    except OSError:
        return False
