"""Tensors in files, read one at a time; those of one model, or of several, whose names differ by their folders then.

Nothing in a file is believed unchecked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fourbit.checkpoint.errors import CheckpointError
from fourbit.state import MAX_META_BYTES, QuantState

if TYPE_CHECKING:
    from typing_extensions import Self

META_MARK = ".quant_state.bitsandbytes__"
"""What the key of a quantization state has between the weight's name and the quant_type."""

READ_BYTES = 1 << 24
"""Most that is asked of the system at once."""


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


def find_quantized(path: Path, entries: Mapping[str, TensorInfo]) -> dict[str, tuple[str, ...]]:
    """The names of one model's 4-bit weights, each with the names of the tensors that hold its state.

    Raises CheckpointError if such a state is there and the weight is not.
    """
    weights = dict.fromkeys(name.partition(META_MARK)[0] for name in entries if META_MARK in name)
    parts: dict[str, list[str]] = {name: [] for name in weights}
    for name in entries:
        stem = name.partition(META_MARK)[0] if META_MARK in name else name.rpartition(".")[0]
        if stem in parts:
            parts[stem].append(name)
    for name in weights:
        if name not in entries:
            raise CheckpointError(f"{path}: {parts[name][0]!r} is there and the weight {name!r} is not")
    return {name: tuple(keys) for name, keys in parts.items()}


class Tensors:
    """Tensors by name, and which of them are 4-bit weights with their states.

    Usable in a `with` statement; a tensor that was read stays valid after `close`.

    Attributes:
        path: that they are in, for messages.
        entries: TensorInfo of each, by name, in the order of the files.
    """

    def __init__(self, path: Path, entries: dict[str, TensorInfo], quantized: Mapping[str, tuple[str, ...]]) -> None:
        self.path, self.entries, self._quantized = path, entries, quantized

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
                self._read_into(info, buffer.numpy().data)
            except OSError as error:
                reason = error.strerror or error
                raise CheckpointError(f"{info.file}: tensor {name!r} cannot be read: {reason}") from error
        return buffer.view(info.dtype).view(info.shape)

    def _read_into(self, info: TensorInfo, target: memoryview) -> None:
        """Fill `target` with a tensor's bytes. Raises OSError."""
        _read_into(info, target)

    def quantized(self) -> Mapping[str, tuple[str, ...]]:
        """The names of the 4-bit weights, each with the names of the tensors that hold its state."""
        return self._quantized

    def parts_of(self, name: str) -> tuple[str, ...]:
        """The names of the tensors that hold a 4-bit weight's state; () for any other tensor."""
        return self._quantized.get(name, ())

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

    def close(self) -> None:
        """No file stays open between two reads; this is for symmetry with other readers."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


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
