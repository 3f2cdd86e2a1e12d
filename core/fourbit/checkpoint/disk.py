"""Writing files of a checkpoint: each under a temporary name, flushed to the disk, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fourbit.checkpoint.errors import CheckpointError, LayoutError
from fourbit.checkpoint.reader import META_MARK
from fourbit.checkpoint.shards import Item, Part, Shard

CHUNK_BYTES = 1 << 22


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write to; it is under its name only once all of it is on the disk."""
    with open(temporary(path), "wb") as stream:
        yield stream
        flush_to_disk(stream)
    os.replace(temporary(path), path)


def temporary(path: Path) -> Path:
    """The name of a file until it is complete: hidden, which no file is that is carried over, and never too long."""
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()
    return path.with_name(f".{digest[:16]}.tmp")


def flush_to_disk(stream: IO[bytes]) -> None:
    """Wait until what was written is on the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file, indented as transformers does."""
    with atomic_file(path) as stream:
        stream.write(_json_text(value) + b"\n")


def _json_text(value: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(value, indent=2, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can only hold escaped
        return json.dumps(value, indent=2).encode()


class ShardWriter:
    """One output file, written item by item in the order of its layout.

    A stream that is at its beginning gets the header first; one at the end of an item is continued.
    Raises LayoutError if what is written is not what the layout says.
    """

    def __init__(self, stream: IO[bytes], shard: Shard) -> None:
        self._stream = stream
        if stream.tell() == 0:
            stream.write(shard.header)

    def write(self, item: Item, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """The tensors of one item, by name: CPU tensors with the layout's dtypes and shapes.

        Returns the SHA-256 of each, in hexadecimal, by name.
        """
        return {part.name: self._write(data) for part, data in _parts(item, tensors)}

    def _write(self, data: memoryview) -> str:
        digest = hashlib.sha256()
        for start in range(0, len(data), CHUNK_BYTES):  # small enough to be hashed and written from the cache
            chunk = data[start : start + CHUNK_BYTES]
            digest.update(chunk)
            self._stream.write(chunk)
        return digest.hexdigest()


def hashes_of(item: Item, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What `ShardWriter.write` returns, without writing."""
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


def copy_files(names: Iterable[str], src: Path, dst: Path) -> None:
    """Copy files of `src` by their relative names, with subfolders.

    Raises CheckpointError if one cannot be opened, and OSError if its copy cannot be written.
    """
    for relative in names:
        target = dst / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            read = open(src / relative, "rb")  # noqa: SIM115
        except OSError as error:
            raise CheckpointError(f"the source's {src / relative} cannot be read: {error.strerror or error}") from error
        with read, atomic_file(target) as written:
            shutil.copyfileobj(read, written)
