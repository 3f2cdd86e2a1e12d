"""What determines an output, as a JSON object: two runs of the same fingerprint write the same bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fourbit.checkpoint import layout, others
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.reader import Checkpoint
from fourbit.checkpoint.shards import Shard
from fourbit.version import __version__


def of(checkpoint: Checkpoint, settings: dict[str, Any], layouts: Iterable[Shard]) -> dict[str, Any]:
    """The fingerprint of a run: `settings` as JSON values, fourbit's version, the output's headers, the source."""
    headers = hashlib.sha256(b"".join(shard.file.encode() + shard.header for shard in layouts)).hexdigest()
    return {"fourbit": __version__, "settings": settings, "headers": headers, "source": of_source(checkpoint)}


def of_source(checkpoint: Checkpoint) -> dict[str, Any]:
    """Size and time of change of each file that is read, and the SHA-256 of headers and of config.json.

    Raises CheckpointError if a file cannot be read (any more).
    """
    folder = checkpoint.path if checkpoint.path.is_dir() else None
    names = {str(file.relative_to(checkpoint.files[0].parent)): file for file in checkpoint.files}
    if folder is not None:
        index = [] if checkpoint.index is None else [checkpoint.index.name]
        extra = [layout.CONFIG_FILE, *index, *others.find(checkpoint).carried]
        names |= {name: folder / name for name in extra if (folder / name).is_file()}  # no pipe
    return {name: _of_file(names[name], name) for name in sorted(names)}


def _of_file(path: Path, name: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as stream:
            stat = os.fstat(stream.fileno())
            found: dict[str, Any] = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            if name.endswith(".safetensors"):
                length = stream.read(8)
                header = stream.read(min(int.from_bytes(length, "little"), stat.st_size))
                found["header_sha256"] = hashlib.sha256(length + header).hexdigest()
            elif name == layout.CONFIG_FILE:
                found["sha256"] = hashlib.sha256(stream.read()).hexdigest()
            return found
    except OSError as error:
        raise CheckpointError(f"the source's {path} cannot be read: {error.strerror or error}") from error


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """In words, what is not the same in two fingerprints."""
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
        found.append("the plan is another")
    return found


def _changed(old: Any, new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    before = old if isinstance(old, dict) else {}
    for key in sorted({*before, *new}):
        if before.get(key) != new.get(key):
            yield key, new.get(key), before.get(key)
