"""A disk that loses power: what it may hold afterwards, by what was flushed and what was only written.

`Disk` watches a folder while a program runs. The model is POSIX's, with the order that journaling file systems keep:

- A file has the bytes of its last fsync; of what was written since, any part may be there, in pages, or zeros.
- A name is a folder's, and durable once the folder is flushed. Of changes of names since then any may be lost; one
  that is there has all earlier ones of the same folders with it. A rename is there in both its folders or in none.

A file that was flushed and whose name was not is lost, and so is a name's content that was not flushed.
"""

from __future__ import annotations

import os
import random
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PAGE = 512
WATCHED = ("fsync", "rename", "replace", "unlink", "remove", "rmdir", "mkdir")
Tree = dict[str, bytes | None]
"""A folder's content by relative path; None for a folder."""


@dataclass(frozen=True)
class Change:
    """One step that is on the disk as a whole or not at all: `(folder, name, what has the name now or None)`."""

    effects: tuple[tuple[int, str, int | None], ...]

    @property
    def folders(self) -> set[int]:
        return {folder for folder, _, _ in self.effects}


class Disk:
    """What may be left of a folder after each moment.

    Attributes:
        states: a Tree for each way in which the power may go, the same ones once.
        moments: how often was looked.
    """

    def __init__(self, root: Path, seed: int = 0) -> None:
        self.root, self.states, self.moments = root, {}, 0
        self._dice = random.Random(seed)
        self._lock = threading.RLock()
        self._busy = False
        self._open: dict[int, int] = {}  # keeps an inode's number from being given to another file
        self._flushed: dict[int, bytes] = {}
        self._changes: list[Change] = []
        self._durable: set[int] = set()
        self._first = self._names()
        self._now = self._first
        for inode in self._files():
            self._flushed[inode] = self._content(inode)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Look before and after each call that orders the disk."""
        with pytest.MonkeyPatch.context() as patch:
            for name in WATCHED:
                patch.setattr(os, name, self._watched(name, getattr(os, name)))
            yield
        self._look()

    def now(self) -> list[Tree]:
        """What may be left if the power goes at this moment."""
        with self._lock:
            self._see()
            return self._possible()

    def _watched(self, name, real):
        def call(*args, **options):
            with self._lock:
                if self._busy:
                    return real(*args, **options)
                self._look()
                result = real(*args, **options)
                if name == "fsync":
                    self._flush(args[0])
                self._look()
                return result

        return call

    def _look(self) -> None:
        with self._lock:
            self.moments += 1
            self._see()
            for tree in self._possible():
                self.states.setdefault(tuple(sorted(tree.items(), key=lambda item: item[0])), self.moments)

    def _names(self) -> dict[int, dict[str, int]]:
        """The names in every folder below the root, as they are; "" has the root."""
        found: dict[int, dict[str, int]] = {0: {"": self._keep(self.root)}}
        for folder, folders, files in os.walk(self.root):
            found[self._keep(Path(folder))] = {name: self._keep(Path(folder, name)) for name in folders + files}
        return found

    def _keep(self, path: Path) -> int:
        inode = os.lstat(path).st_ino
        if inode not in self._open:
            self._open[inode] = os.open(path, os.O_RDONLY)
        return inode

    def _files(self) -> list[int]:
        return [inode for inode, fd in self._open.items() if stat.S_ISREG(os.fstat(fd).st_mode)]

    def _content(self, inode: int) -> bytes:
        return os.pread(self._open[inode], os.fstat(self._open[inode]).st_size, 0)

    def _see(self) -> None:
        """Note what has changed its name since the last look."""
        old, self._now = self._now, self._names()
        gone, new = [], []
        for folder in dict.fromkeys((*self._now, *old)):
            before, after = old.get(folder, {}), self._now.get(folder, {})
            new += [(folder, name, inode) for name, inode in after.items() if before.get(name) != inode]
            gone += [(folder, name, inode) for name, inode in before.items() if name not in after]
        for folder, name, inode in new:
            moved = [(there, old_name, None) for there, old_name, it in gone if it == inode]
            gone = [entry for entry in gone if entry[2] != inode]
            self._changes.append(Change(((folder, name, inode), *moved)))
        self._changes += [Change(((folder, name, None),)) for folder, name, _ in reversed(gone)]

    def _flush(self, descriptor: int) -> None:
        self._see()
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode):
            if found.st_ino in self._open:
                self._flushed[found.st_ino] = self._content(found.st_ino)
        else:
            wanted = [i for i, change in enumerate(self._changes) if found.st_ino in change.folders]
            self._durable |= self._with_earlier(wanted)

    def _with_earlier(self, wanted: list[int]) -> set[int]:
        """These changes, and all that are on the disk if they are."""
        found, folders = set(wanted), set()
        for i in range(len(self._changes) - 1, -1, -1):
            if i in found or self._changes[i].folders & folders:
                found.add(i)
                folders |= self._changes[i].folders
        return found

    def _possible(self) -> list[Tree]:
        loose = [i for i in range(len(self._changes)) if i not in self._durable]
        everything = set(range(len(self._changes)))
        some = [self._durable | self._with_earlier([i]) for i in self._dice.sample(loose, min(4, len(loose)))]
        self._busy = True
        try:
            flushed = [self._tree(changes, self._flushed_only) for changes in (self._durable, everything, *some)]
            torn = [self._tree(changes, self._torn) for changes in (everything, everything, everything, *some[:2])]
            return [*flushed, *torn, self._tree(everything, self._content)]
        finally:
            self._busy = False

    def _flushed_only(self, inode: int) -> bytes:
        return self._flushed.get(inode, b"")

    def _torn(self, inode: int) -> bytes:
        safe, written = self._flushed_only(inode), self._content(inode)
        if safe == written:
            return safe
        size = self._dice.choice((len(safe), len(written), self._dice.randint(0, len(written))))
        pages = []
        for begin in range(0, size, PAGE):
            page = self._dice.choice((safe, written, b""))[begin : min(begin + PAGE, size)]
            pages.append(page.ljust(min(PAGE, size - begin), b"\0"))
        return b"".join(pages)

    def _tree(self, changes: set[int], content) -> Tree:
        names = {folder: dict(entries) for folder, entries in self._first.items()}
        for i in sorted(changes):
            for folder, name, inode in self._changes[i].effects:
                if inode is None:
                    names.setdefault(folder, {}).pop(name, None)
                else:
                    names.setdefault(folder, {})[name] = inode
        tree: Tree = {}

        def fill(folder: int, path: str) -> None:
            for name, inode in names.get(folder, {}).items():
                if stat.S_ISREG(os.fstat(self._open[inode]).st_mode):
                    tree[path + name] = content(inode)
                else:
                    tree[path + name] = None
                    fill(inode, f"{path}{name}/")

        fill(self._first[0][""], "")
        return tree

    def close(self) -> None:
        """Give the descriptors back."""
        for descriptor in self._open.values():
            os.close(descriptor)


def put(tree: Tree, folder: Path) -> Path:
    """A folder with that content."""
    folder.mkdir()
    for name, data in sorted(tree.items()):
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)
    return folder
