"""How weight files are laid out: which tensor goes into which file, and at which byte.

All of it follows from the plan, before a single weight is read: the header of a file can be written first
and the tensors after it one at a time, and the same plan gives the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from fourbit import codebooks
from fourbit.checkpoint import weight_files
from fourbit.checkpoint.errors import CheckpointError
from fourbit.checkpoint.reader import DTYPE_NAMES, META_MARK, TensorInfo
from fourbit.scales import NESTED_BLOCKSIZE
from fourbit.state import QuantState

ALIGN = 8
"""Every tensor starts at a multiple of its item size; headers and 4-bit weights end at multiples of 8."""

MAX_SHARD_BYTES = 5_000_000_000
"""Size at which the next file is begun where nobody says another, as in transformers."""

MOST_SHARDS = 99_999
"""Files that their names, with five digits, can number."""

_SIZE = re.compile(r"\s*([0-9]{1,12}(?:\.[0-9]{1,12})?)\s*([KMGT])(I?)B\s*", re.IGNORECASE)

_OFFSET_CHARS = 24
"""The longest that a float32 gets in JSON, "-1.1754943508222875e-38", and one."""


@dataclass(frozen=True)
class Part:
    """One tensor of an output file: its name, dtype and shape as stored, and its bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Item:
    """What one source tensor becomes: itself, or a packed weight with the parts of its state.

    Attributes:
        source: its name.
        quantize: whether that is to be done.
        parts: tensors as stored; several for a 4-bit weight.
    """

    source: str
    quantize: bool
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Shard:
    """One output file: its name, its header (with the length in front) and its items in the order of the data.

    Attributes:
        prefix: what `file`, and the names of all parts, begin with, and the names in the file itself do not: the
            folder of a model that is one of several.
    """

    file: str
    header: bytes
    items: tuple[Item, ...]
    prefix: str = ""


def parse_size(size: int | str | None) -> int:
    """Bytes that a weight file may have.

    Args:
        size: "5GB", "500MB" (powers of ten), "2GiB" (of two), or a number of bytes; None: 5 GB.

    Raises ValueError for anything else, such as a number without a unit in a string.
    """
    if size is None:
        return MAX_SHARD_BYTES
    nbytes = 0
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if match is not None:
            base, power = 1024 if match[3] else 1000, "KMGT".index(match[2].upper()) + 1
            nbytes = int(float(match[1]) * base**power)
    elif type(size) is int:
        nbytes = size
    if nbytes < 1:
        raise ValueError(f"max_shard_size {size!r} is no size; want for example '5GB', '500MB' or '2GiB'")
    return nbytes


def plain_item(info: TensorInfo) -> Item:
    """A tensor that is copied as it is."""
    return Item(info.name, False, (Part(info.name, info.dtype, info.shape, info.nbytes),))


def packed_item(weight: TensorInfo, state: Iterable[TensorInfo]) -> Item:
    """A 4-bit weight that is copied as it is, with the tensors of its state."""
    found = sorted((weight, *state), key=lambda info: (META_MARK in info.name, -info.dtype.itemsize))
    parts = [Part(info.name, info.dtype, info.shape, info.nbytes) for info in found]
    size = parts[-1].nbytes + -sum(part.nbytes for part in parts) % ALIGN
    return Item(weight.name, False, (*parts[:-1], replace(parts[-1], shape=(size,), nbytes=size)))


def quantized_item(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, quant_type: str, blocksize: int, double_quant: bool
) -> Item:
    """A weight in the bitsandbytes layout, wide parts first and the JSON last, padded with spaces.

    The padding is for the offset of double quantization, which is not known yet, and makes the end a
    multiple of 8, so that whatever follows is aligned. JSON readers skip it.
    """
    state = _shapes_only(torch.Size(shape), dtype, quant_type, blocksize, double_quant)
    packed = (state.numel + 1) // 2
    wide: list[Part] = []
    narrow: list[Part] = []
    json_key, json_bytes = "", 0
    for key, tensor in state.to_state_dict(name + ".").items():
        if META_MARK in key:
            json_key, json_bytes = key, tensor.numel() + _OFFSET_CHARS
        else:
            part = Part(key, tensor.dtype, tuple(tensor.shape), tensor.nbytes)
            (wide if tensor.dtype.itemsize > 1 else narrow).append(part)
    parts = [*wide, *narrow, Part(name, torch.uint8, (packed, 1), packed)]
    json_bytes += -(sum(part.nbytes for part in parts) + json_bytes) % ALIGN
    return Item(name, True, (*parts, Part(json_key, torch.uint8, (json_bytes,), json_bytes)))


def _shapes_only(
    shape: torch.Size, dtype: torch.dtype, quant_type: str, blocksize: int, double_quant: bool
) -> QuantState:
    """A state with the right shapes and no numbers; its scales are one element, expanded."""
    codebook = codebooks.get(quant_type)
    blocks = -(-shape.numel() // blocksize)
    nested: dict[str, torch.Tensor] = {}
    if double_quant:
        nested = {
            "nested_absmax": torch.zeros(-(-blocks // NESTED_BLOCKSIZE)),
            "nested_code": codebooks.dynamic_map(),
            "nested_offset": torch.zeros(()),
        }
    absmax = torch.zeros(1, dtype=torch.uint8 if double_quant else torch.float32).expand(blocks)
    return QuantState(absmax, shape, codebook.tensor(), blocksize, codebook.name, dtype, **nested)


def arrange(
    items: Iterable[Item], metadata: Mapping[str, str], max_shard_bytes: int, stem: str, prefix: str = ""
) -> list[Shard]:
    """Divide items, in their order, among files of at most `max_shard_bytes` (more only for one larger item).

    Their names begin with `prefix`, as those of the items do, and `stem`, such as "model". Raises CheckpointError if
    that makes more files than can be numbered.
    """
    groups: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if groups[-1] and size + item.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.nbytes
    count = len(groups)
    if count == 1:
        return [_shard(weight_files.single_file(stem), groups[0], metadata, prefix)]
    if count > MOST_SHARDS:
        raise CheckpointError(f"files of {max_shard_bytes:,} bytes would be {count}, more than {MOST_SHARDS}")
    names = [weight_files.shard_file(stem, i, count) for i in range(1, count + 1)]
    return [_shard(name, group, metadata, prefix) for name, group in zip(names, groups, strict=True)]


def _shard(name: str, items: list[Item], metadata: Mapping[str, str], prefix: str) -> Shard:
    # 4-bit weights end at multiples of 8, and of the rest the wide types come first: all are aligned then
    ordered = sorted(items, key=lambda item: 0 if len(item.parts) > 1 else 16 - item.parts[0].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for part in (part for item in ordered for part in item.parts):
        end = offset + part.nbytes
        header[part.name.removeprefix(prefix)] = {
            "dtype": DTYPE_NAMES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGN)
    return Shard(prefix + name, len(text).to_bytes(8, "little") + text, tuple(ordered), prefix)


def index(shards: Iterable[Shard]) -> dict[str, object]:
    """The content of one model's index, such as model.safetensors.index.json."""
    weight_map = {
        part.name.removeprefix(shard.prefix): shard.file.removeprefix(shard.prefix)
        for shard in shards
        for item in shard.items
        for part in item.parts
    }
    total = sum(item.nbytes for shard in shards for item in shard.items)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
