"""Putting packed weights together, out of a stream of the tensors of a folder's files.

A packed weight lies in a folder as several tensors: the codes, and beside them the scales, the code table and a JSON
text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from fourbit.checkpoint.tensors import META_MARK
from fourbit.state import QuantState
from fourbit_vllm.packed import PackedTensor, Source

_CODES = ""
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def gathered(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, but each packed weight as one PackedTensor, once its last part has come.

    Parts may come in any order, and from different files. Raises ValueError for a part whose weight never comes, or for
    parts that do not fit each other, naming the weight.
    """
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights:
        weight, part = _part(name)
        if part == _CODES and (isinstance(tensor, PackedTensor) or not _may_be_codes(tensor)):
            yield name, tensor
            continue
        waiting.setdefault(weight, {})[part] = tensor
        packed = _complete(weight, waiting[weight])
        if packed is not None:
            del waiting[weight]
            yield weight, packed
    for name, parts in waiting.items():
        if set(parts) != {_CODES}:
            raise ValueError(f"{name}: the folder has only these parts of a 4-bit weight: {sorted(parts)}")
        yield name, parts[_CODES]


def _part(name: str) -> tuple[str, str]:
    """The weight that a tensor belongs to, and what it is of it."""
    if META_MARK in name:
        weight, _, kind = name.partition(META_MARK)
        return weight, META_MARK + kind
    weight, _, last = name.rpartition(".")
    return (weight, last) if last in _PARTS else (name, _CODES)


def _may_be_codes(tensor: Tensor) -> bool:
    """Packed weights are columns; some matrices in 16 bit are, too, and are handed on at the end."""
    return tensor.dim() == 2 and tensor.shape[1] == 1


def _complete(name: str, parts: dict[str, Tensor]) -> PackedTensor | None:
    """The weight, if all parts are there."""
    meta = next((part for part in parts if part.startswith(META_MARK)), None)
    if meta is None or _CODES not in parts or not {"absmax", "quant_map"} <= set(parts):
        return None
    nested = b'"nested_offset"' in bytes(parts[meta].cpu().reshape(-1)[: 1 << 16].tolist())
    if nested and not {"nested_absmax", "nested_quant_map"} <= set(parts):
        return None
    entries: dict[str, Any] = {f"{name}.{part.removeprefix('.')}": t for part, t in parts.items() if part != _CODES}
    try:
        state = QuantState.from_state_dict(entries, prefix=f"{name}.")
    except KeyError as error:
        raise ValueError(error.args[0]) from error
    codes, want = parts[_CODES], (state.numel + 1) // 2
    if not 0 <= codes.nbytes - want < codes.element_size():  # the storage dtype may be wider than a byte
        raise ValueError(f"{name} has {codes.nbytes} bytes; {list(state.shape)} in 4 bits has {want}")
    return PackedTensor(Source(codes, state))
