"""Reading a folder of safetensors: names, types and shapes from the headers, then one tensor at a time.

It reads plain 16-bit folders, ours and those of bitsandbytes. Nothing in a file is believed unchecked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fourbit.checkpoint import source, untrusted, weight_files
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.tensors import META_MARK, TensorInfo, Tensors, find_quantized

__all__ = ["DTYPES", "DTYPE_NAMES", "META_MARK", "Checkpoint", "TensorInfo", "read_header"]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""What safetensors calls each dtype in a header."""

DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


def _by_name(path: Path, found: Iterable[TensorInfo]) -> dict[str, TensorInfo]:
    """Tensors by their names. Raises CheckpointError for two of one name, of which the index lists neither."""
    entries: dict[str, TensorInfo] = {}
    for info in found:
        other = entries.setdefault(info.name, info)
        if other is not info:
            both = f"{other.file.name} and in {info.file.name}"
            raise CheckpointError(f"{path}: tensor {info.name!r} is in {both}, and the index lists neither")
    return entries


class Checkpoint(Tensors):
    """A folder of safetensors (or one .safetensors or index file), opened by its headers only.

    A repository in the Hub's cache, and the Hub's name of a model that is there, mean its snapshot (`source.located`).

    Usable in a `with` statement; a tensor that was read stays valid after `close`.

    Attributes:
        path: that was opened.
        files: the weight files, sorted by name.
        index: the index's path, None if there is none.
        stem: what the names of the weight files begin with, such as "model".
        entries: TensorInfo of each tensor, by name, in the order of the files.
        config: the parsed config.json, {} if there is none.

    Raises CheckpointError, naming the file, for anything malformed: an index that points outside the
    folder, a missing shard or tensor, a truncated file, a dtype that torch lacks.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        located = source.located(path)
        found = weight_files.find_files(located)
        self.files, self.index, self.stem, self._weight_map = found.files, found.index, found.stem, found.weight_map
        self.metadata: dict[str, str] = {}
        entries = _by_name(located, (info for file in self.files for info in self._scan(file)))
        missing = next((n for n in self._weight_map or () if n not in entries), None)
        if missing is not None:
            assert self._weight_map is not None
            shard = self.files[0].parent / self._weight_map[missing]
            raise CheckpointError(f"{shard} lacks the tensor {missing!r}, which the index says it has")
        super().__init__(located, entries, find_quantized(located, entries))

    def _scan(self, file: Path) -> Iterator[TensorInfo]:
        header, data_begin = read_header(file)
        self.metadata |= header.pop("__metadata__", None) or {}
        # in the order of the data: a disk reads it in one go
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            # a tensor in two shards: the index decides
            if self._weight_map is not None and self._weight_map.get(name, file.name) != file.name:
                continue
            dtype = DTYPES.get(entry["dtype"])
            if dtype is None:
                raise CheckpointError(f"{file}: tensor {name!r} has the unsupported type {entry['dtype']}")
            begin, end = entry["data_offsets"]
            info = TensorInfo(name, dtype, tuple(entry["shape"]), file, end - begin, data_begin + begin)
            if info.nbytes != info.numel * dtype.itemsize:
                raise CheckpointError(f"{file}: tensor {name!r} has {info.nbytes} bytes, not what its shape needs")
            yield info

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed config.json beside the weights, {} if there is none."""
        return untrusted.own_json(self.folder, weight_files.CONFIG_FILE)

    @property
    def folder(self) -> Path:
        """The folder that it is, or that its file is in."""
        return self.path if self.path.is_dir() else self.path.parent

    def unlisted(self) -> list[str]:
        """Names of tensors that are in a shard though the index, if there is one, does not list them."""
        return [name for name in self.entries if self._weight_map is not None and name not in self._weight_map]

    def quantization_config(self) -> dict[str, Any]:
        """config.json's entry on quantization, {} if there is none."""
        entry = self.config.get("quantization_config") or {}
        if not isinstance(entry, dict):
            raise CheckpointError(f"{self.path}: quantization_config in config.json is not an object")
        return entry

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self.entries)} tensors, {len(self.files)} files)"


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and where its data begins.

    safetensors itself checks it (no holes, no overlaps, nothing beyond the file's end) before it is used here.
    Raises CheckpointError, naming the file.
    """
    try:
        with safe_open(str(file), framework="pt") as handle:
            names = set(handle.keys())
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > os.fstat(stream.fileno()).st_size:
                raise ValueError("it changes while it is read")
            header = json.loads(stream.read(length), object_pairs_hook=untrusted.unique_names)
    except (SafetensorError, OSError, RuntimeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error
    if header.keys() - {"__metadata__"} != names:
        raise CheckpointError(f"{file} cannot be read as safetensors: its header is ambiguous")
    return header, 8 + length
