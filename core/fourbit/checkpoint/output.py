"""The weight files of an unfinished folder: written in order, noted in the journal, taken up again."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from fourbit.checkpoint import disk
from fourbit.checkpoint.disk import CHUNK_BYTES, flush_to_disk, hash_of, temporary
from fourbit.checkpoint.errors import LayoutError
from fourbit.checkpoint.file_layout import Item, Part, Shard
from fourbit.checkpoint.journal import Journal
from fourbit.checkpoint.reader import META_MARK

SYNC_BYTES = 1 << 28
SYNC_SECONDS = 2.0
"""After so many bytes, or seconds, what is written is flushed to the disk and noted: so much is lost at most."""


class Output:
    """Writes tensors one after the other to a temporary file, which gets its name once all of it is on the disk.

    Args:
        folder: to write to.
        journal: of it.
        done: for each shard that is begun, how many of its items are there; see `recover`.
        unfinished: the path of a file until it is complete, from the one that it has then.
    """

    def __init__(
        self,
        folder: Path,
        journal: Journal,
        done: Mapping[str, int],
        unfinished: Callable[[Path], Path] = temporary,
    ) -> None:
        self._folder, self._journal, self._done, self._unfinished = folder, journal, done, unfinished
        self._shard: Shard | None = None
        self._stream: IO[bytes]
        self._pending: dict[str, dict[str, str]] = {}
        self._pending_bytes = 0
        self._synced = time.monotonic()

    def write(self, shard: Shard, item: Item, tensors: Mapping[str, Tensor]) -> None:
        """The tensors of the next item, by name: on the CPU, with the layout's dtypes and shapes.

        Raises OSError, or LayoutError if they have others.
        """
        if shard is not self._shard:
            self._begin(shard)
        self._pending[item.source] = {part.name: self._write(data) for part, data in _parts(item, tensors)}
        self._pending_bytes += item.nbytes
        if item is shard.items[-1]:
            self._end()
        elif self._pending_bytes >= SYNC_BYTES or time.monotonic() - self._synced >= SYNC_SECONDS:
            self._sync()

    def write_empty(self, shard: Shard) -> None:
        """A shard without items."""
        self._begin(shard)
        self._end()

    def close(self) -> None:
        """Note what is complete, and close the file. Raises OSError if that cannot be."""
        if self._shard is not None:
            try:
                self._sync()
            finally:
                self._shard = None
                self._stream.close()

    def _begin(self, shard: Shard) -> None:
        path = self._unfinished(self._folder / shard.file)
        path.parent.mkdir(parents=True, exist_ok=True)
        # what was recovered ends at the end of an item
        self._stream = open(path, "ab" if self._done.get(shard.file) else "wb")  # noqa: SIM115
        for folder in (path.parent, *path.parent.parents):  # what will be noted has a name then
            disk.sync_folder(folder)
            if folder == self._folder:
                break
        self._shard = shard
        if self._stream.tell() == 0:
            self._stream.write(shard.header)

    def _write(self, data: memoryview) -> str:
        """Append bytes; returns their SHA-256, in hexadecimal."""
        digest = hashlib.sha256()
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = data[start : start + CHUNK_BYTES]
            digest.update(chunk)
            self._stream.write(chunk)
        return digest.hexdigest()

    def _end(self) -> None:
        assert self._shard is not None
        path = self._folder / self._shard.file
        flush_to_disk(self._stream)
        self._shard = None
        self._stream.close()
        os.replace(self._unfinished(path), path)
        self._note()

    def _sync(self) -> None:
        if self._pending:
            flush_to_disk(self._stream)
            self._note()

    def _note(self) -> None:
        self._journal.append(self._pending)
        self._pending, self._pending_bytes, self._synced = {}, 0, time.monotonic()


def hashes_of(item: Item, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The SHA-256 of each of an item's tensors, in hexadecimal, by name; as `Output` notes them."""
    return {part.name: hashlib.sha256(data).hexdigest() for part, data in _parts(item, tensors)}


def _parts(item: Item, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Part, memoryview]]:
    if set(tensors) != {part.name for part in item.parts}:
        raise LayoutError(f"{item.source}: got {sorted(tensors)}, not what the layout says")
    return ((part, _data(part, tensors[part.name])) for part in item.parts)


def _data(part: Part, tensor: Tensor) -> memoryview:
    """The bytes of a tensor, little-endian as on every machine that torch runs on."""
    if META_MARK in part.name and tensor.numel() <= part.nbytes:
        tensor = torch.nn.functional.pad(tensor, (0, part.nbytes - tensor.numel()), value=ord(" "))
    if tensor.dtype != part.dtype or tuple(tensor.shape) != part.shape:
        raise LayoutError(f"{part.name}: want {part.dtype} {list(part.shape)}, got {tensor.dtype} {list(tensor.shape)}")
    if not tensor.numel():
        return memoryview(b"")
    data: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def recover(folder: Path, shards: Sequence[Shard], hashes: Mapping[str, dict[str, str]]) -> dict[str, int]:
    """How many items of each shard are in `folder`, right to the last bit; whatever follows them is removed.

    The journal's hashes are compared with those of the bytes in the files, so that neither a file that is too
    short nor one that was changed is continued. Raises OSError.
    """
    done: dict[str, int] = {}
    _remove_others(folder, shards)
    whole = True
    for shard in shards:
        path = folder / shard.file
        if whole:
            count, end = _uncovered(path, shard, hashes)
            if count:
                done[shard.file] = count
            whole = bool(shard.items) and count == len(shard.items)
            if whole:
                _cut(path, end)
                os.replace(temporary(path), path)
            elif count:
                _cut(path, end)
            else:
                temporary(path).unlink(missing_ok=True)
        else:
            path.unlink(missing_ok=True)
            temporary(path).unlink(missing_ok=True)
    return done


def _remove_others(folder: Path, shards: Sequence[Shard]) -> None:
    """All but weight files: they are copied again, and nothing else may be left to be published."""
    files = [folder / shard.file for shard in shards]
    keep = {path for file in files for path in (file, temporary(file))}
    around = {parent for file in files for parent in file.parents}
    todo = [folder]
    while todo:
        for path in todo.pop().iterdir():
            if path in keep:
                continue
            if path.is_symlink() or not path.is_dir():
                path.unlink()
            elif path in around:
                todo.append(path)
            else:
                shutil.rmtree(path)


def _uncovered(path: Path, shard: Shard, hashes: Mapping[str, dict[str, str]]) -> tuple[int, int]:
    """`intact` of a weight file, which has its temporary name then."""
    if path.exists():
        os.replace(path, temporary(path))
    return intact(temporary(path), shard, hashes)


def intact(path: Path, shard: Shard, hashes: Mapping[str, dict[str, str]]) -> tuple[int, int]:
    """How many items at a file's beginning are as noted, and where they end. Raises OSError."""
    try:
        stream = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return 0, 0
    with stream:
        if stream.read(len(shard.header)) != shard.header:
            return 0, 0
        count, end = 0, len(shard.header)
        for item in shard.items:
            noted = hashes.get(item.source)
            if noted is None or any(noted.get(p.name) != hash_of(stream, p.nbytes) for p in item.parts):
                break
            count, end = count + 1, end + item.nbytes
        return count, end


def _cut(path: Path, end: int) -> None:
    with open(temporary(path), "r+b") as stream:
        stream.truncate(end)
        flush_to_disk(stream)
