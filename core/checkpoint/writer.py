"""Writing files of a checkpoint: each under a temporary name, flushed to the disk, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.reader import META_MARK
from fourbit.checkpoint.shards import Item, Part, Shard

_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".ot"),
    *(".onnx", ".onnx_data", ".tflite", ".index.json"),
)
"""Files that hold or list weights, and so are not carried over."""


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write to; it is under its name only once all of it is on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "xb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file, indented as transformers does."""
    with atomic_file(path) as stream:
        stream.write(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


class ShardWriter:
    """One output file, written item by item in the order of its layout.

    Raises CheckpointError if what is written is not what the layout says.
    """

    def __init__(self, stream: IO[bytes], shard: Shard) -> None:
        self._stream = stream
        stream.write(shard.header)

    def write(self, item: Item, tensors: Mapping[str, Tensor]) -> None:
        """The tensors of one item, by name: CPU tensors with the layout's dtypes and shapes."""
        if set(tensors) != {part.name for part in item.parts}:
            raise CheckpointError(f"{item.source}: got {sorted(tensors)}, not what the layout says")
        for part in item.parts:
            self._stream.write(_data(part, tensors[part.name]))


def _data(part: Part, tensor: Tensor) -> memoryview:
    """The bytes of a tensor, little-endian as on every machine that torch runs on."""
    if META_MARK in part.name and tensor.numel() <= part.nbytes:
        tensor = torch.nn.functional.pad(tensor, (0, part.nbytes - tensor.numel()), value=ord(" "))
    if tensor.dtype != part.dtype or tuple(tensor.shape) != part.shape:
        raise CheckpointError(
            f"{part.name}: want {part.dtype} {list(part.shape)}, got {tensor.dtype} {list(tensor.shape)}"
        )
    if not tensor.numel():
        return memoryview(b"")
    data: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def copy_other_files(src: Path, dst: Path) -> tuple[list[str], list[str]]:
    """Carry over what is no weight and no config.json: tokenizer, templates, licence, code; with subfolders.

    Returns the relative names of `(copied, left_out)`. Hidden files and folders are not considered.
    """
    copied: list[str] = []
    left_out: list[str] = []
    for folder, folders, files in os.walk(src):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            source = Path(folder) / name
            relative = source.relative_to(src)
            if name.startswith(".") or str(relative) == "config.json":
                continue
            if name.endswith(_WEIGHT_SUFFIXES):
                left_out.append(str(relative))
                continue
            target = dst / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(source, "rb") as read, atomic_file(target) as written:
                shutil.copyfileobj(read, written)
            copied.append(str(relative))
    return copied, left_out
