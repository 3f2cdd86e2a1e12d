"""Reading a folder of safetensors: names, types and shapes from the headers, then one tensor at a time.

It reads plain 16-bit folders, ours and those of bitsandbytes. Nothing in a file is believed unchecked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fourbit.checkpoint import source, untrusted, weight_files
from fourbit.checkpoint.errors import CheckpointError
from fourbit.state import MAX_META_BYTES, QuantState

META_MARK = ".quant_state.bitsandbytes__"
"""What the key of a quantization state has between the weight's name and the quant_type."""

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

READ_BYTES = 1 << 24
"""Most that is asked of the system at once."""

DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says about one tensor.

    Attributes:
        name: of the tensor.
        dtype: as stored.
        shape: as stored; a packed 4-bit weight has [ceil(n/2), 1].
        file: that it is in.
        nbytes: of its data.
        offset: of its first byte, from the beginning of the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    nbytes: int
    offset: int

    @property
    def numel(self) -> int:
        """Elements as stored."""
        return prod(self.shape)


def _by_name(path: Path, found: Iterable[TensorInfo]) -> dict[str, TensorInfo]:
    """Tensors by their names. Raises CheckpointError for two of one name, of which the index lists neither."""
    entries: dict[str, TensorInfo] = {}
    for info in found:
        other = entries.setdefault(info.name, info)
        if other is not info:
            both = f"{other.file.name} and in {info.file.name}"
            raise CheckpointError(f"{path}: tensor {info.name!r} is in {both}, and the index lists neither")
    return entries


class Checkpoint:
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
        self.path = source.located(path)
        found = weight_files.find_files(self.path)
        self.files, self.index, self.stem, self._weight_map = found.files, found.index, found.stem, found.weight_map
        self.metadata: dict[str, str] = {}
        self.entries = _by_name(self.path, (info for file in self.files for info in self._scan(file)))
        missing = next((n for n in self._weight_map or () if n not in self.entries), None)
        if missing is not None:
            assert self._weight_map is not None
            shard = self.files[0].parent / self._weight_map[missing]
            raise CheckpointError(f"{shard} lacks the tensor {missing!r}, which the index says it has")
        self._quantized = self._find_quantized()

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

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(info.nbytes for info in self.entries.values())

    def info(self, name: str) -> TensorInfo:
        """The entry of one tensor. Raises CheckpointError if there is none of that name."""
        try:
            return self.entries[name]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor {name!r}") from None

    def read(self, name: str) -> Tensor:
        """One tensor as stored, on the CPU. Raises CheckpointError, naming the tensor."""
        info = self.info(name)
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        if info.nbytes:
            try:
                _read_into(info, buffer.numpy().data)
            except OSError as error:
                reason = error.strerror or error
                raise CheckpointError(f"{info.file}: tensor {name!r} cannot be read: {reason}") from error
        return buffer.view(info.dtype).view(info.shape)

    def _find_quantized(self) -> dict[str, tuple[str, ...]]:
        weights = dict.fromkeys(name.partition(META_MARK)[0] for name in self.entries if META_MARK in name)
        parts: dict[str, list[str]] = {name: [] for name in weights}
        for name in self.entries:
            stem = name.partition(META_MARK)[0] if META_MARK in name else name.rpartition(".")[0]
            if stem in parts:
                parts[stem].append(name)
        for name in weights:
            if name not in self.entries:
                raise CheckpointError(f"{self.path}: {parts[name][0]!r} is there and the weight {name!r} is not")
        return {name: tuple(keys) for name, keys in parts.items()}

    def unlisted(self) -> list[str]:
        """Names of tensors that are in a shard though the index, if there is one, does not list them."""
        return [name for name in self.entries if self._weight_map is not None and name not in self._weight_map]

    def quantized(self) -> Mapping[str, tuple[str, ...]]:
        """The names of the 4-bit weights, each with the names of the tensors that hold its state."""
        return self._quantized

    def companions(self) -> frozenset[str]:
        """Names of all tensors that only describe a 4-bit weight."""
        return frozenset(key for keys in self._quantized.values() for key in keys)

    def state(self, name: str) -> QuantState:
        """The quantization state of a 4-bit weight, which fits it. Raises CheckpointError, naming what is wrong."""
        if name not in self._quantized:
            self.info(name)
            raise CheckpointError(f"{self.path}: tensor {name!r} is not a 4-bit weight")
        keys = self._quantized[name]
        for key in keys:
            if META_MARK in key and self.entries[key].nbytes > MAX_META_BYTES:
                raise CheckpointError(f"{self.path}: {key!r} has {self.entries[key].nbytes} bytes of JSON")
        try:
            state = QuantState.from_state_dict({key: self.read(key) for key in keys}, prefix=name + ".")
        except CheckpointError:
            raise
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{self.path}: {error.args[0] if error.args else error}") from error
        # the storage dtype may be wider, and then the bytes are rounded up to whole elements
        want, info = (state.numel + 1) // 2, self.info(name)
        if not 0 <= info.nbytes - want < info.dtype.itemsize:
            raise CheckpointError(
                f"{self.path}: {name!r} has {info.nbytes} bytes; {list(state.shape)} in 4 bits has {want}"
            )
        return state

    def read_4bit(self, name: str) -> tuple[Tensor, QuantState]:
        """A 4-bit weight: packed uint8 [ceil(n/2), 1], and its state, both on the CPU.

        Weights that bitsandbytes stored under another dtype of the same bytes come back as uint8. Raises
        CheckpointError, naming the tensor, if weight and state do not fit each other.
        """
        state = self.state(name)
        codes = self.read(name).contiguous().view(-1).view(torch.uint8)[: (state.numel + 1) // 2]
        return codes.view(-1, 1), state

    def quantization_config(self) -> dict[str, Any]:
        """config.json's entry on quantization, {} if there is none."""
        entry = self.config.get("quantization_config") or {}
        if not isinstance(entry, dict):
            raise CheckpointError(f"{self.path}: quantization_config in config.json is not an object")
        return entry

    def close(self) -> None:
        """No file stays open between two reads; this is for symmetry with other readers."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

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


def _read_into(info: TensorInfo, target: memoryview) -> None:
    """Plain reads: pages of a mapped file would count as this process's memory."""
    with open(info.file, "rb", buffering=0) as stream:
        stream.seek(info.offset)
        done = 0
        while done < info.nbytes:
            count = stream.readinto(target[done : done + READ_BYTES])
            if not count:
                raise OSError(f"it ends {info.nbytes - done} bytes early; the file has become shorter")
            done += count
