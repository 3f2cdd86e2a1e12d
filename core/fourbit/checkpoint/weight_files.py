"""Which files make up a checkpoint: one .safetensors file, or an index with its shards.

A folder is input from a stranger: neither an index nor a link may point outside the folder.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourbit.checkpoint import links
from fourbit.checkpoint.errors import CheckpointError

STEMS = ("model", "diffusion_pytorch_model")
"""What weight files are called by transformers, and by diffusers."""

CONFIG_FILE = "config.json"
MANIFEST_FILE = "fourbit_manifest.json"
PIPELINE_FILE = "model_index.json"
"""What makes a folder a pipeline of diffusers, with a model in each subfolder."""
MOST_PARTS = 12
"""Names that an error lists."""
_INDEX_NAME = re.compile(r"\.safetensors\.index(\.[^.]+)?\.json$")
MAX_JSON_BYTES = 1 << 28
"""Longest JSON file that is read; an index of a million tensors has about 100 MB."""


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a checkpoint.

    Attributes:
        files: sorted by name.
        weight_map: the index's, of tensor names to file names; None without an index.
        index: its path; None without one.
        stem: what the names of files and index begin with, shard numbers and variants such as "fp16" left out:
            "model", or "diffusion_pytorch_model". Libraries look for it.
    """

    files: list[Path]
    weight_map: dict[str, str] | None
    index: Path | None
    stem: str


def single_file(stem: str) -> str:
    """The name of the only weight file of a folder."""
    return f"{stem}.safetensors"


def index_file(stem: str) -> str:
    """The name of the index of a folder of several."""
    return f"{stem}.safetensors.index.json"


def shard_file(stem: str, number: int, count: int) -> str:
    """The name of one of several weight files, counted from 1."""
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def find_files(path: Path) -> WeightFiles:
    """The weight files of a folder (or one .safetensors or index file).

    Raises CheckpointError, naming the path, if it is no checkpoint, if a shard is missing, or if a file of a folder
    is a link out of it. A file that is named itself may be any link.
    """
    if path.is_file():
        if _INDEX_NAME.search(path.name):
            return _from_index(path)
        if path.suffix == ".safetensors":
            # a file of any other name is no library's, and becomes one that transformers finds
            stem = stem_of(path.name)
            return WeightFiles([path], None, None, stem if stem in STEMS else STEMS[0])
        raise CheckpointError(f"{path} is neither a folder nor a .safetensors file")
    if not path.is_dir():
        exists = os.path.lexists(path)
        raise CheckpointError(f"{path} is neither a folder nor a file" if exists else f"{path} does not exist")
    if (path / PIPELINE_FILE).is_file():
        raise CheckpointError(f"{path} is a pipeline of diffusers ({PIPELINE_FILE}), not one model; {_parts(path)}")
    for stem in STEMS:  # the order in which transformers and diffusers look
        if is_there(path / single_file(stem)):
            return _single(path / single_file(stem), path)
        if is_there(path / index_file(stem)):
            return _from_index(path / index_file(stem), path)
    names = sorted(p.name for p in path.iterdir() if p.name.endswith((".safetensors", ".json")))
    indexes = [name for name in names if _INDEX_NAME.search(name)]
    for found, opened in ((indexes, _from_index), ([n for n in names if n.endswith(".safetensors")], _single)):
        if len(found) == 1:
            return opened(path / found[0], path)
        if found:
            raise CheckpointError(f"{path} has {len(found)} candidates ({', '.join(found[:4])}); name one of them")
    other = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
    hint = f"; it has {other[0]}, and fourbit reads safetensors only" if other else ""
    parts = _parts(path)
    raise CheckpointError(f"{path} has no .safetensors file{hint}" + (f"; {parts}" if parts else ""))


def stem_of(name: str) -> str:
    """A weight file's name without its suffix, shard number and, where a library put one in, variant."""
    stem = re.sub(r"-\d{5}-of-\d{5}", "", name.removesuffix(".safetensors"))
    first = stem.partition(".")[0]
    # the variant names the type, as in model.fp16.safetensors: what is written is another, and there is only one
    return first if first in STEMS else stem


def _parts(path: Path) -> str:
    """What to name instead of a folder that is no model itself: its folders with weights, and its files."""
    folders = (p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = sorted(f"{p.name}/" for p in folders if next(p.glob("*.safetensors"), None) is not None)
    found += sorted(p.name for p in path.glob("*.safetensors"))
    more = f" and {len(found) - MOST_PARTS} more" if len(found) > MOST_PARTS else ""
    return f"it has weights in {', '.join(found[:MOST_PARTS])}{more}: name one of these" if found else ""


def _single(path: Path, folder: Path) -> WeightFiles:
    _require_file(path, folder)
    return WeightFiles([path], None, None, stem_of(path.name))


def _from_index(path: Path, folder: Path | None = None) -> WeightFiles:
    if folder is not None:
        _require_file(path, folder)
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
        links.require_inside(file_path, path.parent)
    return WeightFiles(files, weight_map, path, stem_of(_INDEX_NAME.sub("", path.name)))


def _require_file(path: Path, folder: Path) -> None:
    """That it is a file, and in the folder whatever links it is made of."""
    links.require_inside(path, folder)
    is_there(path)


def own_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object from a file of a folder, {} if there is none.

    Raises CheckpointError, naming the file, if it is a link out of the folder, no file, or no JSON object.
    """
    if not is_there(folder / name):
        return {}
    links.require_inside(folder / name, folder)
    return read_json(folder / name)


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
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it has the name {name[:80]!r} twice in an object")
        found[name] = value
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
