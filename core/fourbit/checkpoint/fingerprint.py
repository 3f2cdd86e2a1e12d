"""What determines an output, as a JSON object: two runs of the same fingerprint write the same bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fourbit.checkpoint import others, untrusted
from fourbit.checkpoint.compound import Compound
from fourbit.checkpoint.disk import hash_of
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.file_layout import Shard
from fourbit.version import __version__


def of(source: Compound, beside: others.Others, settings: dict[str, Any], shards: Iterable[Shard]) -> dict[str, Any]:
    """The fingerprint of a run: `settings` as JSON values, fourbit's version, the output's headers, the source."""
    headers = hashlib.sha256(b"".join(shard.file.encode() + shard.header for shard in shards)).hexdigest()
    return {"fourbit": __version__, "settings": settings, "headers": headers, "source": of_source(source, beside)}


def of_source(source: Compound, beside: others.Others) -> dict[str, Any]:
    """What each file that is read is: of weights size, header, inode and times, of all others size and SHA-256.

    At a URL: what is said of it there, instead of inode and times.

    Raises CheckpointError if a file cannot be read (any more).
    """
    found = {name: _of_file(file, name) for name, file in sorted(_files(source, beside).items())}
    if source.remote is not None:  # inode and times are those of what stands for it here
        here = ("mtime_ns", *_IDENTITY)
        for name, entry in found.items():
            kept = {key: value for key, value in entry.items() if key not in here}
            found[name] = {**kept, "there": source.remote.identity(name)}
    return found


def _files(source: Compound, beside: others.Others) -> dict[str, Path]:
    """Every file of the source that is read, by name relative to the folder."""
    names = source.files | {name: source.folder / name for name in beside.carried}
    own = source.configs | source.indexes
    return names | {name: path for name, path in own.items() if untrusted.is_there(path)}


_IDENTITY = ("ctime_ns", "inode")
"""Also another after a copy or a new link, of which the content need not be another."""


def _of_file(path: Path, name: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as stream:
            stat = os.fstat(stream.fileno())
            if not name.endswith(".safetensors"):
                return {"bytes": stat.st_size, "sha256": hash_of(stream, stat.st_size)}
            length = stream.read(8)
            header = stream.read(min(int.from_bytes(length, "little"), stat.st_size))
            return {
                "bytes": stat.st_size,
                "mtime_ns": stat.st_mtime_ns,
                "ctime_ns": stat.st_ctime_ns,
                "inode": stat.st_ino,
                "header_sha256": hashlib.sha256(length + header).hexdigest(),
            }
    except OSError as error:
        raise CheckpointError(f"the source's {path} cannot be read: {error.strerror or error}") from error


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """In words, what is not the same in two fingerprints, beside the identity of source files.

    Where only that differs, the content may be the same or not; converting it again tells.
    """
    old, new = {**old, "source": _content(old.get("source"))}, {**new, "source": _content(new["source"])}
    found = []
    if old.get("fourbit") != new["fourbit"]:
        found.append(f"fourbit is {new['fourbit']}, was {old.get('fourbit')}")
    found += [
        f"{key} is {value}, was {before}" for key, value, before in _changed(old.get("settings"), new["settings"])
    ]
    for name, value, before in _changed(old.get("source"), new["source"]):
        what = "is new" if before is None else "is gone" if value is None else "has changed"
        found.append(f"the source's {name} {what}")
    if not found and old != new:
        found.append("the plan, or the size of weight files, is another")
    return found


def _content(source: Any) -> dict[str, Any]:
    """The entries of `of_source` less what tells a file from a copy of it."""
    entries = source if isinstance(source, dict) else {}
    return {
        name: {key: value for key, value in entry.items() if key not in _IDENTITY} if isinstance(entry, dict) else entry
        for name, entry in entries.items()
    }


def _changed(old: Any, new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    before = old if isinstance(old, dict) else {}
    for key in sorted({*before, *new}):
        if before.get(key) != new.get(key):
            yield key, new.get(key), before.get(key)
