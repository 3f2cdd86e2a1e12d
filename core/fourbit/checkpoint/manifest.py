"""The manifest of a finished folder: every tensor and file in it with its size and hash, and what it was made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fourbit.checkpoint import untrusted
from fourbit.checkpoint.disk import hash_of
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.file_layout import Shard
from fourbit.checkpoint.tensors import META_MARK
from fourbit.checkpoint.weight_files import MANIFEST_FILE
from fourbit.state import dtype_name
from fourbit.version import __version__

FORMAT = 1

_TENSOR_FIELDS = {"file": str, "dtype": str, "shape": list, "offset": int, "bytes": int, "sha256": str}
_FILE_FIELDS = {"bytes": int, "sha256": str}


def build(
    folder: Path,
    shards: Sequence[Shard],
    hashes: Mapping[str, dict[str, str]],
    others: Sequence[str],
    fingerprint: Mapping[str, Any],
) -> dict[str, Any]:
    """The manifest of a folder.

    Args:
        folder: with all files in it.
        shards: of the weight files.
        hashes: of each source tensor's parts, as in the journal.
        others: relative names of all other files.
        fingerprint: of the run.
    """
    tensors: dict[str, Any] = {}
    for shard in shards:
        offset = len(shard.header)
        for item in shard.items:
            for part in item.parts:
                tensors[part.name] = {
                    "file": shard.file,
                    "dtype": dtype_name(part.dtype),
                    "shape": list(part.shape),
                    "offset": offset,  # from the beginning of the file
                    "bytes": part.nbytes,
                    "sha256": hashes[item.source][part.name],
                }
                offset += part.nbytes
    quantized = len({name.partition(META_MARK)[0] for name in tensors if META_MARK in name})
    return {
        "format": FORMAT,
        "fourbit": __version__,
        "fingerprint": dict(fingerprint),
        "totals": {
            "tensors": len(tensors),
            "quantized": quantized,  # by this run, or before it
            "bytes": sum(entry["bytes"] for entry in tensors.values()),
        },
        "files": {PurePosixPath(Path(name)).as_posix(): file_entry(folder / name) for name in others},
        "tensors": tensors,
    }


def file_entry(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        return {"bytes": size, "sha256": hash_of(stream, size)}


def read(folder: Path) -> dict[str, Any] | None:
    """A folder's manifest, every field checked; None if there is none. Raises CheckpointError, naming the field."""
    path = folder / MANIFEST_FILE
    if not untrusted.is_there(path):
        return None
    value = untrusted.read_json(path)
    if value.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {json.dumps(value.get('format'))[:40]} is not {FORMAT}")
    for key in ("tensors", "files", "totals", "fingerprint"):
        if not isinstance(value.get(key), dict):
            raise CheckpointError(f"{path}: {key} is missing or no object")
    for key, fields in (("tensors", _TENSOR_FIELDS), ("files", _FILE_FIELDS)):
        for name, entry in value[key].items():
            for field, kind in fields.items():
                if not isinstance(entry, dict) or type(entry.get(field)) is not kind:
                    raise CheckpointError(f"{path}: {key}: {name!r}: {field} is missing or of the wrong type")
    for name in value["files"]:
        if not all(untrusted.is_plain_name(part) for part in name.split("/")):
            raise CheckpointError(f"{path}: files: {name!r} is not a relative name within the folder")
    return value
