"""A folder that appears all at once: everything is written beside it and renamed at the very end."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fourbit.checkpoint import destination, disk, journal, snapshot
from fourbit.checkpoint.destination import UNFINISHED, unfinished_folder
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.snapshot import Snapshot

DATA_FOLDER = "data"
LOCK_FILE = "lock"
PARTS_FOLDER = "parts"
"""What several processes write, until it is put together in `data/`."""
TEAM_FOLDER = "team"
"""Where they say how far they are."""
REPLACED_FOLDER = "replaced"


def check_space(folder: Path, nbytes: int) -> None:
    """Raise CheckpointError if `folder`'s disk has no room for `nbytes`."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise CheckpointError(f"{folder} has {free:,} bytes free, and {nbytes:,} are needed")


class Stage:
    """The unfinished folder of a destination, `.DST.unfinished` beside it, while one run has it.

    It holds the journal, a lock that other runs respect, `data/`, which becomes the destination, and for the moment
    between two renames `replaced/`, which was it. Whatever becomes of the run, the next one finds it.
    """

    def __init__(self, dst: Path) -> None:
        """Make the folder if need be, and lock it. Raises CheckpointError if that fails, or another run has it."""
        self.dst = dst
        self.folder = unfinished_folder(dst)
        self.data = self.folder / DATA_FOLDER
        self.replaced = self.folder / REPLACED_FOLDER
        try:
            _make(dst.parent)
            _require_ours(self.folder)
            self.folder.mkdir(exist_ok=True)
            self._lock = FileLock(self.folder / LOCK_FILE, timeout=0)
            self._lock.acquire()
            disk.sync_folder(self.folder)  # the lock is what says whose folder it is
            disk.sync_folder(dst.parent)
        except Timeout:
            raise CheckpointError(f"another run is writing {dst} (it has locked {self.folder})") from None
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"cannot write in {dst.parent}: {reason}") from error

    def clear(self) -> None:
        """Remove what is done, and make `data/`. Raises OSError."""
        (self.folder / journal.JOURNAL_FILE).unlink(missing_ok=True)  # first: without it the rest counts for nothing
        for folder in (self.data, self.folder / PARTS_FOLDER):
            if os.path.lexists(folder):
                shutil.rmtree(folder)
        self.data.mkdir()

    def publish(self, replaces: Snapshot | None) -> Path | None:
        """Rename `data/` to the destination.

        Args:
            replaces: what may be there, and goes then; what has appeared or changed since is never removed.

        Returns the folder with what was replaced, if it could not be removed. Raises CheckpointError, with the
        destination as it was, if it may not be replaced or cannot be renamed.
        """
        disk.sync_tree(self.data)
        disk.sync_folder(self.folder)
        try:
            if os.path.lexists(self.dst):
                self._set_aside(replaces)
            os.rename(self.data, self.dst)
        except BaseException as error:
            kept = self._put_back()
            where = f". What it replaced is now {kept}" if kept else ""
            if isinstance(error, OSError):
                what = (
                    f"cannot rename the finished folder to {self.dst}: {error.strerror or error}; --resume tries again"
                )
                raise CheckpointError(what + where) from error
            if kept and isinstance(error, CheckpointError):
                raise CheckpointError(f"{error}{where}") from None
            raise
        disk.sync_folder(self.dst.parent)
        disk.sync_folder(self.folder)
        return self.remove_replaced(replaces)

    def _set_aside(self, replaces: Snapshot | None) -> None:
        if replaces is None:
            raise CheckpointError(
                f"the destination {self.dst} has appeared meanwhile, and is not replaced. The finished folder is"
                f" {self.data}: move {self.dst} elsewhere, then --resume puts it in place"
            )
        os.rename(self.dst, self.replaced)
        # only now, when nobody can add to it under its name any more
        destination.require_same(replaces, self.replaced, self.dst)

    def _put_back(self) -> Path | None:
        """After a rename that failed: the destination as it was. Returns where it is if it cannot have its name."""
        if not os.path.lexists(self.replaced) or not os.path.lexists(self.data):
            return None  # not renamed, or the new one is in place
        if os.path.lexists(self.dst):
            return self.remove_replaced(None)
        try:
            os.rename(self.replaced, self.dst)
        except OSError:
            return self.remove_replaced(None)
        disk.sync_folder(self.dst.parent)
        return None

    def remove_replaced(self, replaces: Snapshot | None) -> Path | None:
        """Remove the folder that was replaced: of it, what was to be. Returns where the rest is, if there is one."""
        if not os.path.lexists(self.replaced):
            return None
        if replaces is not None and snapshot.remove(replaces, self.replaced):
            return None
        number, kept = 1, self.dst.with_name(f"{self.dst.name}.replaced")
        while os.path.lexists(kept):
            number += 1
            kept = self.dst.with_name(f"{self.dst.name}.replaced-{number}")
        try:
            os.rename(self.replaced, kept)
        except OSError:
            return self.replaced
        return kept

    def release(self, discard: bool) -> None:
        """Let other runs have the folder; with `discard`, remove first what is fourbit's in it."""
        lock = self.folder / LOCK_FILE
        if discard:
            with suppress(OSError):
                for folder in (self.data, self.folder / PARTS_FOLDER, self.folder / TEAM_FOLDER):
                    if os.path.lexists(folder):
                        shutil.rmtree(folder)
                # the journal goes late: with it, what is left is known to be unfinished
                for path in (self.folder / journal.JOURNAL_FILE, disk.temporary(self.folder / journal.JOURNAL_FILE)):
                    path.unlink(missing_ok=True)
                if os.listdir(self.folder) == [LOCK_FILE]:
                    lock.unlink()
                    self.folder.rmdir()
        self._lock.release()
        if discard and os.name == "nt":  # where an open file cannot be removed
            with suppress(OSError):
                lock.unlink(missing_ok=True)
                self.folder.rmdir()


def tidy(dst: Path) -> Path | None:
    """Finish what a run that was killed left between its last renames.

    A folder that was to be replaced gets its name back if nothing has it, and is removed if the new one has. An
    unfinished folder without data is removed. Returns where a folder is that was replaced and cannot be removed.
    Raises CheckpointError if another run is writing `dst`, or the unfinished folder is not fourbit's.
    """
    folder = unfinished_folder(dst)
    if not os.path.lexists(folder):
        return None
    stage = Stage(dst)
    kept = None
    try:
        begun = journal.read_own(folder)
        if os.path.lexists(stage.replaced):
            if not os.path.lexists(dst):
                os.rename(stage.replaced, dst)
                disk.sync_folder(dst.parent)
            else:  # with data, the destination is none that the run has put there
                published = begun is not None and not os.path.lexists(stage.data)
                kept = stage.remove_replaced(begun.replaces if begun is not None and published else None)
    except OSError as error:
        raise CheckpointError(
            f"a run that was to replace {dst} ended halfway, and what it replaced is {stage.replaced}; it cannot be"
            f" renamed: {error.strerror or error}"
        ) from error
    finally:
        stage.release(discard=not os.path.lexists(stage.data))
    return kept


def is_unfinished(path: Path) -> bool:
    """Whether `path` is an unfinished folder, or the data in one."""
    inside = path.name == DATA_FOLDER and path.parent.name.endswith(UNFINISHED)
    return inside or (path.name.endswith(UNFINISHED) and path.name.startswith("."))


def _make(folder: Path) -> None:
    """Make a folder and those around it, so that they outlast a power cut."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        disk.sync_folder(path.parent)


def _require_ours(folder: Path) -> None:
    """Raise CheckpointError if the folder is there and is not one that a run has made: nothing in it may be removed."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; fourbit needs this name. Move it elsewhere")
    names = set(os.listdir(folder))
    if names and not names & {LOCK_FILE, journal.JOURNAL_FILE}:
        raise CheckpointError(f"{folder} was not made by fourbit, which needs this name. Move it elsewhere")
