"""A folder that appears all at once: everything is written beside it and renamed at the very end."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fourbit.checkpoint import layout
from fourbit.checkpoint.errors import CheckpointError

UNFINISHED = ".unfinished"
"""How the name of a folder ends that is being written; it begins with a dot and DST's name."""


def check_destination(src: Path, dst: Path, overwrite: bool) -> None:
    """Raise CheckpointError if a model of `src` must not be written to `dst`; both are resolved paths."""
    if dst == src or dst in src.parents:
        raise CheckpointError(f"the destination {dst} is the source, or a folder around it")
    if src.is_dir() and src in dst.parents:
        raise CheckpointError(f"the destination {dst} lies inside the source {src}")
    if not dst.exists():
        return
    if not overwrite:
        raise CheckpointError(f"the destination {dst} exists already (--overwrite replaces it)")
    if not dst.is_dir():
        raise CheckpointError(f"the destination {dst} is not a folder, and is not replaced by one")
    if any(dst.iterdir()) and not any(dst.glob("*.safetensors")):
        # a slip such as --overwrite with the home folder must not remove it
        raise CheckpointError(f"the destination {dst} holds something else than a model, and is not replaced")


def check_space(folder: Path, nbytes: int) -> None:
    """Raise CheckpointError if `folder`'s disk has no room for `nbytes`."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise CheckpointError(f"{folder} has {free:,} bytes free, and {nbytes:,} are needed")


@contextmanager
def staged_folder(dst: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `dst` to write to; it becomes `dst` when the block ends, and goes if it fails.

    Raises CheckpointError if the folder cannot be made or renamed.
    """
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        temporary = dst.parent / f".{dst.name}.{secrets.token_hex(4)}{UNFINISHED}"
        temporary.mkdir()
    except OSError as error:
        raise CheckpointError(f"cannot write in {dst.parent}: {error.strerror or error}") from error
    try:
        yield temporary
        layout.sync_folder(temporary)
        _put_in_place(temporary, dst, overwrite)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    layout.sync_folder(dst.parent)


def _put_in_place(temporary: Path, dst: Path, overwrite: bool) -> None:
    old = None
    try:
        if dst.exists():
            if not overwrite:
                raise CheckpointError(f"the destination {dst} has appeared meanwhile")
            old = dst.parent / f".{dst.name}.{secrets.token_hex(4)}.replaced"
            os.rename(dst, old)
        os.rename(temporary, dst)
    except OSError as error:
        if old is not None and old.exists() and not dst.exists():
            os.rename(old, dst)
        raise CheckpointError(f"cannot rename the finished folder to {dst}: {error.strerror or error}") from error
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
