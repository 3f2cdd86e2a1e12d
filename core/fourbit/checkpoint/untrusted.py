"""Files of a folder that may be a stranger's: what a link, a name or a JSON text in it may do.

Links are followed within the folder, and nowhere else: one such as `notes.txt -> /home/me/.ssh/id_rsa` would put the
user's own file into a copy that is passed on. The one place outside that is known is where the Hub's cache keeps the
files of a snapshot.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from fourbit.checkpoint.errors import CheckpointError

MAX_JSON_BYTES = 1 << 28
"""Longest JSON file that is read; an index of a million tensors has about 100 MB."""

_SHARED_BLOB = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")


def stays_inside(path: Path, folder: Path) -> bool:
    """Whether `path`, all links followed, lies in `folder`, or in the blobs of the snapshot that `folder` is (in)."""
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if real.is_relative_to(home):
        return True
    repository = next((p.parent.parent for p in (home, *home.parents) if p.parent.name == "snapshots"), None)
    if repository is None:
        return False
    if real.parent == repository / "blobs":
        return True
    # newer caches keep one copy for all repositories: huggingface_hub/utils/_shared_blobs.py
    store = repository.parent / "blobs"
    return real.is_relative_to(store) and _SHARED_BLOB.fullmatch(real.relative_to(store).as_posix()) is not None


def require_inside(path: Path, folder: Path) -> None:
    """Raise CheckpointError if `path` is a link that leads out of `folder`."""
    if not stays_inside(path, folder):
        raise CheckpointError(
            f"{path} is a link to {os.path.realpath(path)}, outside of its folder, and is not followed: a folder"
            " could have any file of this machine read so. If it is yours, put the file itself there"
        )


def is_plain_name(name: str) -> bool:
    """Whether `name` is one component of a path, on any operating system."""
    forbidden = set("/\\:\0") & set(name)
    return bool(name) and not forbidden and name not in (".", "..") and os.path.basename(name) == name


def is_file(path: Path) -> bool:
    """Whether it is a file; a name that the system refuses, such as one too long, is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_there(path: Path) -> bool:
    """Whether a file of that name is there.

    Raises CheckpointError for what only looks absent or would never end: a link that leads nowhere, a pipe, a
    folder, or what cannot be looked at.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise CheckpointError(f"{path} cannot be looked at: {error.strerror or error}") from error
    if not is_file(path):
        raise CheckpointError(f"{path} is no file, or a link that leads nowhere")
    return True


def own_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object from a file of a folder, {} if there is none.

    Raises CheckpointError, naming the file, if it is a link out of the folder, no file, or no JSON object.
    """
    if not is_there(folder / name):
        return {}
    require_inside(folder / name, folder)
    return read_json(folder / name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError, naming the file, if it is not one."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size} bytes, more than a JSON file of a checkpoint ever has")
        value = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=unique_names)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, want an object")
    return value


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: an object in which a name is there twice is an error. Readers differ in which they take."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it has the name {name[:80]!r} twice in an object")
        found[name] = value
    return found
