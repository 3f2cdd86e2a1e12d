"""A folder that appears all at once: everything is written beside it and renamed at the very end."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fourbit.checkpoint import journal, layout
from fourbit.checkpoint.errors import CheckpointError

UNFINISHED = ".unfinished"
"""How the name of a folder ends that is being written; it begins with a dot and DST's name."""

DATA_FOLDER = "data"
LOCK_FILE = "lock"


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


class Stage:
    """The unfinished folder of a destination, `.DST.unfinished` beside it, while one run has it.

    It holds the journal, a lock that other runs respect, and `data/`, which becomes the destination. Until then
    nothing in it has the destination's name, and whatever becomes of the run, the next one finds it.
    """

    def __init__(self, dst: Path) -> None:
        """Make the folder if need be, and lock it. Raises CheckpointError if that fails, or another run has it."""
        self.dst = dst
        self.folder = unfinished_folder(dst)
        self.data = self.folder / DATA_FOLDER
        try:
            dst.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            self._lock = FileLock(self.folder / LOCK_FILE, timeout=0)
            self._lock.acquire()
        except Timeout:
            raise CheckpointError(f"another run is writing {dst} (it has locked {self.folder})") from None
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"cannot write in {dst.parent}: {reason}") from error

    def clear(self) -> None:
        """Remove all but the lock, and make `data/`. Raises OSError."""
        (self.folder / journal.JOURNAL_FILE).unlink(missing_ok=True)  # first: without it the rest counts for nothing
        if self.data.exists():
            shutil.rmtree(self.data)
        self.data.mkdir()

    def publish(self, replace: bool) -> None:
        """Rename `data/` to the destination. Raises CheckpointError if that fails, or may not replace what is there."""
        layout.sync_folder(self.data)
        _put_in_place(self.data, self.dst, replace)
        layout.sync_folder(self.dst.parent)

    def release(self, discard: bool) -> None:
        """Let other runs have the folder; with `discard`, remove it first."""
        if discard:
            with suppress(OSError):  # the journal goes last: with it, what is left is known to be unfinished
                shutil.rmtree(self.data)
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()
        if discard and os.name == "nt":  # where an open file cannot be removed
            shutil.rmtree(self.folder, ignore_errors=True)


def unfinished_folder(dst: Path) -> Path:
    """Where a run writes what is to become `dst`."""
    return dst.parent / f".{dst.name}{UNFINISHED}"


def check_unlocked(dst: Path) -> None:
    """Raise CheckpointError if another run is writing `dst` at this moment."""
    Stage(dst).release(discard=False)


def is_unfinished(path: Path) -> bool:
    """Whether `path` is an unfinished folder, or the data in one."""
    inside = path.name == DATA_FOLDER and path.parent.name.endswith(UNFINISHED)
    return inside or (path.name.endswith(UNFINISHED) and path.name.startswith("."))


@contextmanager
def staged_folder(dst: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `dst` to write to; it becomes `dst` when the block ends, and goes if it fails.

    Raises CheckpointError if the folder cannot be made or renamed, or another run is writing `dst`.
    """
    stage = Stage(dst)
    try:
        try:
            stage.clear()
        except OSError as error:
            raise CheckpointError(f"cannot write in {dst.parent}: {error.strerror or error}") from error
        yield stage.data
        stage.publish(overwrite)
    finally:
        stage.release(discard=True)


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
