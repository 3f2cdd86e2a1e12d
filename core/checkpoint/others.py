"""The files of a model folder beside its weights: which are carried over, and whether they can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fourbit.checkpoint import layout, shards
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.reader import Checkpoint
from fourbit.checkpoint.writer import copy_other_files, other_files, write_json


def names(checkpoint: Checkpoint) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the files that are carried over, and of files with weights that are not read."""
    if not checkpoint.path.is_dir():
        return (), ()
    copied, weights = other_files(checkpoint.path)
    used = {file.name for file in checkpoint.files} | {layout.INDEX_FILE}
    return tuple(copied), tuple(name for name in weights if name not in used)


def require_free_names(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if a file that is to be carried over has a name that cannot be had in the new folder.

    Weight files are not among them: what ends as theirs is never carried over.
    """
    taken = {layout.CONFIG_FILE, layout.MANIFEST_FILE}
    for name in names(checkpoint)[0]:
        parts = Path(name).parts
        if parts[0] in taken or parts[0].endswith((".safetensors", ".index.json")):  # a folder of that name
            raise CheckpointError(f"{checkpoint.path / name} cannot be copied: {parts[0]!r} is a file that is written")
        if not all(layout.is_plain_name(part) for part in parts):
            raise CheckpointError(f"{checkpoint.path / name} cannot be copied: other systems have no such name")


def write(
    checkpoint: Checkpoint, folder: Path, layouts: Sequence[shards.Shard], config: Mapping[str, Any] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Carry over files with their subfolders, and write the index and config.json. Returns `names`."""
    if checkpoint.path.is_dir():
        copy_other_files(checkpoint.path, folder)
    if len(layouts) > 1:
        write_json(folder / layout.INDEX_FILE, shards.index(layouts))
    if config is not None:
        write_json(folder / layout.CONFIG_FILE, config)
    return names(checkpoint)
