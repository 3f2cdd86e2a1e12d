"""What a model folder has beside the weights that are read: what a copy carries over, and what it leaves out.

What a folder of several models names belongs to it, also where its weights are in a form that is not read here. Other
weights (of other frameworks, of the original authors) are the same model again.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourbit.checkpoint import untrusted, weight_files
from fourbit.checkpoint.compound import Compound
from fourbit.checkpoint.disk import copy_files, write_json
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.weight_files import MAX_OTHER_BYTES, holds_weights

MAX_DEPTH = 16
"""Folders within folders that are carried over."""


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


def find(source: Compound) -> Others:
    """The other files of a source; none for one that is a single file.

    Hidden files and folders, each model's config.json and a manifest, which describes the files beside it, are in no
    list. Raises CheckpointError for a config.json that is malformed, or a link out of the folder.
    """
    folder = source.path
    if not folder.is_dir():
        return Others()
    for member in source.members.values():  # whose config.json may be carried over as it is
        member.checkpoint.quantization_config()
    ours = {*source.files, *source.configs, *source.indexes, weight_files.MANIFEST_FILE}
    carried: list[str] = []
    left_out: list[str] = []
    skipped: dict[str, str] = {}
    nbytes = 0
    for name, entry in _walk(folder, skipped):
        posix = Path(name).as_posix()
        if posix in ours:
            continue
        if holds_weights(name) and not (source.layout.needs(posix) and not _is_again(folder, posix)):
            left_out.append(name)
            continue
        size, fault = _examined(folder, entry)
        if fault:
            skipped[name] = fault
        else:
            carried.append(name)
            nbytes += size
    return Others(tuple(sorted(carried)), tuple(sorted(left_out)), dict(sorted(skipped.items())), nbytes)


def every_file(source: Compound, beside: Others) -> list[Path]:
    """All files of a source's folder but hidden ones, read or not; of a single file, what is read with it."""
    names = [*beside.carried, *beside.left_out, *beside.skipped]
    own = [path for path in (*source.configs.values(), *source.indexes.values()) if path.exists()]
    return [*source.files.values(), *own, *(source.path / name for name in names)]


def require_free_names(source: Compound, beside: Others) -> None:
    """Raise CheckpointError if a file that is to be carried over has a name that cannot be had in the new folder."""
    models = {Path(folder).parts for folder in source.members}
    for name in beside.carried:
        parts = Path(name).parts
        for i, part in enumerate(parts):
            weights = part.endswith((".safetensors", ".index.json")) or part == weight_files.CONFIG_FILE
            if (weights and parts[:i] in models) or (
                not i and part == weight_files.MANIFEST_FILE
            ):  # a folder so called
                raise CheckpointError(f"{source.path / name} cannot be copied: {part!r} is a file that is written")
        if not all(untrusted.is_plain_name(part) for part in parts):
            raise CheckpointError(f"{source.path / name} cannot be copied: other systems have no such name")


def write(source: Compound, beside: Others, folder: Path, written: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """Carry over files with their subfolders, and write JSON files, by name. Returns the names of all these."""
    same = [name for name, path in source.configs.items() if name not in written and untrusted.is_there(path)]
    copy_files([*beside.carried, *same], source.folder, folder)
    new = {name: value for name, value in written.items() if value is not None}
    for name, value in new.items():
        write_json(folder / name, value)
    return [*beside.carried, *same, *new]


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
    if found.st_size > MAX_OTHER_BYTES and not holds_weights(path.name):
        return 0, f"{found.st_size:,} bytes, too large for anything but weights"
    return found.st_size, ""


def _is_again(folder: Path, name: str) -> bool:
    """Whether a model's weights are there twice, and this is the form that is not loaded then."""
    return name.endswith("pytorch_model.bin") and (folder / name).with_name("model.safetensors").is_file()
