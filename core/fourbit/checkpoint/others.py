"""What a model folder has beside the weights that are read: what a copy carries over, and what it leaves out.

A model of sentence-transformers has further modules with weights of their own in subfolders, which modules.json
names: they belong to the model. Other weights (of other frameworks, of the original authors) are the same model again.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from fourbit.checkpoint import file_layout, untrusted, weight_files
from fourbit.checkpoint.disk import copy_files, write_json
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.reader import Checkpoint

MODULES_FILE = "modules.json"
MAX_OTHER_BYTES = 1 << 32
"""A larger file that is no weight is not carried over: no tokenizer, template or licence has a tenth of it."""
MAX_DEPTH = 16
"""Folders within folders that are carried over."""

_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".keras", ".msgpack", ".npz", ".ot"),
    *(".onnx", ".onnx_data", ".onnx.data", ".tflite", ".pdparams", ".nemo"),
)
"""Files that hold weights, and so are not carried over."""

_MODULE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Where a module of sentence-transformers looks for its weights, in that order."""


@dataclass(frozen=True)
class Others:
    """The files of a folder that are neither read nor written anew; relative names, sorted.

    Attributes:
        carried: those that a copy has too: tokenizer, templates, licence, code, weights of further modules.
        left_out: with weights in another form, or of another model.
        skipped: what is not safe to copy, with the reason: links out of the folder, pipes, devices.
        nbytes: of those carried.
    """

    carried: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0


def find(checkpoint: Checkpoint) -> Others:
    """The other files of a checkpoint; none for one that is a single file.

    Hidden files and folders, config.json and a manifest, which describes the files beside it, are in no list. Raises
    CheckpointError if modules.json names a folder elsewhere.
    """
    folder = checkpoint.path
    if not folder.is_dir():
        return Others()
    ours = {file.name for file in checkpoint.files} | {weight_files.CONFIG_FILE, weight_files.MANIFEST_FILE}
    if checkpoint.index is not None:
        ours.add(checkpoint.index.name)
    modules = _module_folders(folder)
    carried: list[str] = []
    left_out: list[str] = []
    skipped: dict[str, str] = {}
    nbytes = 0
    for name, entry in _walk(folder, skipped):
        if name in ours:
            continue
        if _holds_weights(name) and not _of_module(folder, name, modules):
            left_out.append(name)
            continue
        size, fault = _examined(folder, entry)
        if fault:
            skipped[name] = fault
        else:
            carried.append(name)
            nbytes += size
    return Others(tuple(sorted(carried)), tuple(sorted(left_out)), dict(sorted(skipped.items())), nbytes)


def every_file(checkpoint: Checkpoint, beside: Others) -> list[Path]:
    """All files of a checkpoint's folder but hidden ones, read or not; of a single file, what is read with it."""
    names = [*beside.carried, *beside.left_out, *beside.skipped]
    index = [] if checkpoint.index is None else [checkpoint.index]
    config = checkpoint.folder / weight_files.CONFIG_FILE
    return [*checkpoint.files, *index, *([config] if config.exists() else []), *(checkpoint.path / n for n in names)]


def require_free_names(checkpoint: Checkpoint, beside: Others) -> None:
    """Raise CheckpointError if a file that is to be carried over has a name that cannot be had in the new folder."""
    taken = {weight_files.CONFIG_FILE, weight_files.MANIFEST_FILE}
    for name in beside.carried:
        parts = Path(name).parts
        if parts[0] in taken or parts[0].endswith((".safetensors", ".index.json")):  # a folder of that name
            raise CheckpointError(f"{checkpoint.path / name} cannot be copied: {parts[0]!r} is a file that is written")
        if not all(untrusted.is_plain_name(part) for part in parts):
            raise CheckpointError(f"{checkpoint.path / name} cannot be copied: other systems have no such name")


def write(
    checkpoint: Checkpoint,
    beside: Others,
    folder: Path,
    shards: Sequence[file_layout.Shard],
    config: Mapping[str, Any] | None,
) -> list[str]:
    """Carry over files with their subfolders, and write the index and config.json. Returns the names of all these."""
    written: dict[str, Mapping[str, Any]] = {}
    if len(shards) > 1:
        written[weight_files.index_file(checkpoint.stem)] = file_layout.index(shards)
    if config is not None:
        written[weight_files.CONFIG_FILE] = config
    copy_files(beside.carried, checkpoint.path, folder)
    for name, value in written.items():
        write_json(folder / name, value)
    return [*beside.carried, *written]


def _walk(folder: Path, skipped: dict[str, str]) -> Iterator[tuple[str, Path]]:
    """Relative name and path of all that is no folder; folders that cannot be entered are noted in `skipped`."""
    todo = [(folder, 0)]
    while todo:
        here, depth = todo.pop()
        if depth > MAX_DEPTH:  # thousands, else, would be more than recursions and the system's paths can do
            skipped[os.path.relpath(here, folder)] = f"a folder in more than {MAX_DEPTH} others"
            continue
        try:
            with os.scandir(here) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            skipped[os.path.relpath(here, folder)] = f"cannot be listed: {error.strerror or error}"
            continue
        for entry in entries:
            path = here / entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                todo.append((path, depth + 1))
            elif os.path.isdir(path):
                skipped[str(path.relative_to(folder))] = f"a link to the folder {os.path.realpath(path)}"
            else:
                yield str(path.relative_to(folder)), path


def _holds_weights(name: str) -> bool:
    is_index = name.endswith(".json") and ".index." in name
    return name.endswith(_WEIGHT_SUFFIXES) or is_index or ".ckpt.data-" in name


def _examined(folder: Path, path: Path) -> tuple[int, str]:
    """The bytes of a file, and why it is not to be copied, if it is not."""
    if not untrusted.stays_inside(path, folder):
        return 0, f"a link out of the folder, to {os.path.realpath(path)}"
    try:
        found = path.stat()
    except OSError as error:
        return 0, "a link that leads nowhere" if path.is_symlink() else f"cannot be read: {error.strerror or error}"
    if not stat.S_ISREG(found.st_mode):  # reading a pipe or a device would never end
        return 0, "no file, but a pipe, socket or device"
    if found.st_size > MAX_OTHER_BYTES and not _holds_weights(path.name):
        return 0, f"{found.st_size:,} bytes, too large for anything but weights"
    return found.st_size, ""


def _module_folders(folder: Path) -> frozenset[str]:
    """The folders that modules.json of sentence-transformers names, "/" between their parts."""
    file = folder / MODULES_FILE
    if not file.is_file() or not untrusted.stays_inside(file, folder) or file.stat().st_size > untrusted.MAX_JSON_BYTES:
        return frozenset()
    try:
        listed = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return frozenset()  # some other library's: it is carried over, whatever it is
    found = set()
    for module in listed if isinstance(listed, list) else ():
        place = module.get("path") if isinstance(module, dict) and "type" in module else None
        if not isinstance(place, str) or not place:  # the model itself is in ""
            continue
        parts = PurePosixPath(place).parts
        if not all(untrusted.is_plain_name(part) for part in parts):
            raise CheckpointError(f"{file} names the module {place!r}, which is no folder within {folder}")
        found.add("/".join(parts))
    return frozenset(found)


def _of_module(folder: Path, name: str, modules: frozenset[str]) -> bool:
    """Whether a weight file is the one that a module loads."""
    path = PurePosixPath(Path(name).as_posix())
    if path.name not in _MODULE_WEIGHTS or not any(str(parent) in modules for parent in path.parents):
        return False
    first = next((n for n in _MODULE_WEIGHTS if (folder / path.parent / n).is_file()), path.name)
    return path.name == first
