"""Which files make up a checkpoint: one .safetensors file, or an index with its shards.

A folder is input from a stranger: an index may not point outside the folder.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fourbit.checkpoint.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
MANIFEST_FILE = "fourbit_manifest.json"
MAX_JSON_BYTES = 1 << 28
"""Longest JSON file that is read; an index of a million tensors has about 100 MB."""


def find_files(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of a folder (or one .safetensors or index file), and the index's weight map if any.

    Raises CheckpointError, naming the path, if it is no checkpoint, or if a shard is missing.
    """
    if path.is_file():
        if path.name.endswith(".safetensors.index.json"):
            return _from_index(path)
        if path.suffix == ".safetensors":
            return [path], None
        raise CheckpointError(f"{path} is neither a folder nor a .safetensors file")
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist")
    if is_there(path / SINGLE_FILE):  # the order in which transformers looks
        return [path / SINGLE_FILE], None
    if is_there(path / INDEX_FILE):
        return _from_index(path / INDEX_FILE)
    for pattern, opened in (("*.safetensors.index.json", _from_index), ("*.safetensors", _single)):
        found = sorted(p for p in path.glob(pattern) if p.is_file())
        if len(found) == 1:
            return opened(found[0])
        if found:
            names = ", ".join(p.name for p in found[:4])
            raise CheckpointError(f"{path} has {len(found)} candidates ({names}); name one of them")
    other = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
    hint = f"; it has {other[0]}, and fourbit reads safetensors only" if other else ""
    raise CheckpointError(f"{path} has no .safetensors file{hint}")


def _single(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    return [path], None


def _from_index(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing, empty or not an object")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not is_plain_name(file) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: tensor {name!r} is said to be in {file!r}, which is not the plain name of a"
                " .safetensors file in the same folder"
            )
    files = [path.parent / file for file in sorted(set(weight_map.values()))]
    for file_path in files:
        if not _is_file(file_path):
            raise CheckpointError(f"{path} names the shard {file_path.name}, which is missing")
    return files, weight_map


def _is_file(path: Path) -> bool:
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
    if not _is_file(path):
        raise CheckpointError(f"{path} is no file, or a link that leads nowhere")
    return True


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: an object in which a name is there twice is an error. Readers differ in which they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        name = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"it has the name {name[:80]!r} twice in an object")
    return found


def is_plain_name(name: str) -> bool:
    """Whether `name` is one component of a path, on any operating system."""
    forbidden = set("/\\:\0") & set(name)
    return bool(name) and not forbidden and name not in (".", "..") and os.path.basename(name) == name


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
