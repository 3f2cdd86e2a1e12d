"""PackedTensor: a 4-bit weight on its way from a folder into vLLM's layers, as a tensor of the weight's own shape.

vLLM's models rename, split, stack and shard the tensors of a folder by operations on their dimensions. On rows these
are done on row numbers and change no bits; `cut` then takes out the part that a layer keeps. Anything else that is done
with such a tensor sees its dequantized values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fourbit.checks import MIN_BLOCKSIZE
from fourbit.functional import dequantize_4bit
from fourbit.state import QuantState

_aten = torch.ops.aten


class Piece(NamedTuple):
    """A part of a packed weight, or several parts below each other: rows of `width` elements.

    `codes`: uint8 [ceil(n/2)]; `scales`: float32 [ceil(n/blocksize)]; `code`: float32 [16].
    """

    codes: Tensor
    scales: Tensor
    code: Tensor
    blocksize: int
    rows: int
    width: int

    def copied(self, device: torch.device) -> Piece:
        """The same with tensors of its own, on `device`: a part of a file's tensor keeps all of that alive."""
        codes, scales, code = (tensor.to(device, copy=True) for tensor in (self.codes, self.scales, self.code))
        return self._replace(codes=codes, scales=scales, code=code)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[rows, width] in `dtype`."""
        weight = (self.codes, self.scales, self.code, self.blocksize)
        dequantized: Tensor = torch.ops.fourbit.dequantize_4bit(*weight, (self.rows, self.width), dtype)
        return dequantized


class Source:
    """A whole packed weight of a folder: `codes`, uint8 of any shape, and its state."""

    def __init__(self, codes: Tensor, state: QuantState) -> None:
        if len(state.shape) < 2:
            raise ValueError(f"a 4-bit weight has shape {list(state.shape)}: want a matrix, or a stack of them")
        self.codes, self.state = codes.contiguous().view(-1).view(torch.uint8)[: (state.numel + 1) // 2], state
        self.width = state.shape[-1]

    @cached_property
    def scales(self) -> Tensor:
        """All scales in float32: nested blocks would cross the borders of shards and of fused layers."""
        return self.state.scales()

    def finer(self, blocksize: int) -> Tensor:
        """The scales as those of smaller blocks: each repeated, which changes no value."""
        times = self.state.blocksize // blocksize
        if times == 1:
            return self.scales
        return self.scales.repeat_interleave(times)[: -(-self.state.numel // blocksize)]


class PackedTensor(torch.Tensor):
    """Rows of a packed weight, in any order and of any shape, and a range of their columns.

    Args:
        source: that they are of.
        rows: their numbers, int64 of any shape; None: all.
        columns: first, and the one after the last; None: all.
    """

    source: Source
    rows: Tensor
    columns: tuple[int, int]

    @staticmethod
    def __new__(
        cls: type[PackedTensor], source: Source, rows: Tensor | None = None, columns: tuple[int, int] | None = None
    ) -> PackedTensor:
        shape = source.state.shape
        if rows is None:
            rows = torch.arange(prod(shape[:-1]), device="cpu").view(shape[:-1])
        columns = columns or (0, source.width)
        made: PackedTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            (*rows.shape, columns[1] - columns[0]),
            dtype=source.state.dtype,
            device=source.codes.device,
            requires_grad=False,
        )
        made.source, made.rows, made.columns = source, rows, columns
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedTensor({list(self.shape)}, {self.source.state.quant_type}, of {list(self.source.state.shape)})"

    def with_rows(self, rows: Tensor) -> PackedTensor:
        """Other rows of the same weight, of the same columns."""
        return PackedTensor(self.source, rows, self.columns)

    def unpacked(self) -> Tensor:
        """The values, in the dtype that was quantized."""
        piece = cut(self)
        if piece is not None:
            return piece.dequantize(self.dtype).view(self.shape)
        whole = dequantize_4bit(self.source.codes, self.source.state).view(-1, self.source.width)
        return whole[self.rows.to(whole.device), slice(*self.columns)]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # which torch's own types have as a function
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = _KNOWN.get(func)
        if known is not None and isinstance(args[0], cls):
            found = known(func, *args, **kwargs)
            if found is not None:
                return found
        from torch.utils._pytree import tree_map_only

        args, kwargs = tree_map_only(cls, cls.unpacked, (args, kwargs))
        return func(*args, **kwargs)


def cut(packed: PackedTensor) -> Piece | None:
    """The codes and scales of these rows and columns; None where no block of 32 or more fits their borders.

    A border that runs through a block halves it until none does: both halves have the block's scale.
    """
    source, state = packed.source, packed.source.state
    numbers = packed.rows.reshape(-1)
    rows, (first, last), width = numbers.numel(), packed.columns, source.width
    if (first, last) == (0, width) and _rising(numbers):  # end to end, and blocks may run from one row into the next
        start = int(numbers[0]) * width
        end = start + rows * width
        blocksize = _fitting(state.blocksize, start, 0 if end == state.numel else end)
        if blocksize is None:
            return None
        codes = source.codes[start // 2 : (end + 1) // 2]
        scales = source.finer(blocksize)[start // blocksize : -(-end // blocksize)]
        return Piece(codes, scales, state.code, blocksize, rows, width)
    blocksize = _fitting(state.blocksize, width, first, last)
    if blocksize is None:
        return None
    chosen = _chosen(numbers, source.codes.device)
    codes = source.codes.view(-1, width // 2)[chosen, first // 2 : last // 2].reshape(-1)
    scales = source.finer(blocksize).view(-1, width // blocksize)
    scales = scales[chosen, first // blocksize : last // blocksize].reshape(-1)
    return Piece(codes, scales, state.code, blocksize, rows, last - first)


def _fitting(blocksize: int, *borders: int) -> int | None:
    """The largest blocksize up to this one of which all borders are multiples; None if it would be below 32."""
    while blocksize >= MIN_BLOCKSIZE:
        if not any(border % blocksize for border in borders):
            return blocksize
        blocksize //= 2
    return None


def join(pieces: list[Piece]) -> Piece | None:
    """One piece of several, below each other; None where they have different code tables, or blocks would be torn."""
    blocksize = min(piece.blocksize for piece in pieces)
    first = pieces[0]
    if len(pieces) == 1:
        return first
    torn = any(piece.rows * piece.width % blocksize for piece in pieces[:-1])
    torn = torn or any(piece.rows * piece.width % piece.blocksize for piece in pieces if piece.blocksize != blocksize)
    if torn or any(piece.width != first.width or not torch.equal(piece.code, first.code) for piece in pieces):
        return None
    scales = [piece.scales.repeat_interleave(piece.blocksize // blocksize) for piece in pieces]
    codes = torch.cat([piece.codes for piece in pieces])
    rows = sum(piece.rows for piece in pieces)
    return Piece(codes, torch.cat(scales), first.code, blocksize, rows, first.width)


def _rising(numbers: Tensor) -> bool:
    return bool((numbers.diff() == 1).all())


def _chosen(numbers: Tensor, device: torch.device) -> Any:
    """An index of these rows: a range where they are one, which copies nothing."""
    if _rising(numbers):
        first = int(numbers[0])
        return slice(first, first + numbers.numel())
    return numbers.to(device)


# ---- operations on dimensions, done on row numbers. Each returns None where the last dimension has part in it. -----


def _same(func: Any, packed: PackedTensor, *_: Any, **__: Any) -> PackedTensor:
    return packed.with_rows(packed.rows)


def _slice(func: Any, packed: PackedTensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    if dim % packed.dim() < packed.dim() - 1:
        return packed.with_rows(func(packed.rows, dim % packed.dim(), start, end, step))
    if step != 1:
        return None
    first, last, _ = slice(start, end).indices(packed.shape[-1])
    offset = packed.columns[0]
    return PackedTensor(packed.source, packed.rows, (offset + first, offset + max(first, last)))


def _leading(func: Any, packed: PackedTensor, *arguments: Any) -> Any:
    """select, unbind, split, split_with_sizes: the dimension is the last argument but for `select`."""
    takes_first = func in (_aten.select.int, _aten.unbind.int)
    if takes_first:
        dim, rest = (arguments[0] if arguments else 0), arguments[1:]
    else:
        dim, rest = (arguments[1] if len(arguments) > 1 else 0), arguments[:1]
    dim %= packed.dim()
    if dim == packed.dim() - 1:
        return None
    found = func(packed.rows, dim, *rest) if takes_first else func(packed.rows, *rest, dim)
    return packed.with_rows(found) if isinstance(found, Tensor) else [packed.with_rows(each) for each in found]


def _unsqueezed(func: Any, packed: PackedTensor, dim: int) -> Any:
    dim %= packed.dim() + 1
    return None if dim == packed.dim() else packed.with_rows(packed.rows.unsqueeze(dim))


def _viewed(func: Any, packed: PackedTensor, size: list[int]) -> Any:
    sizes = list(_sizes(packed, size))
    return packed.with_rows(packed.rows.reshape(sizes[:-1])) if sizes[-1] == packed.shape[-1] else None


def _sizes(packed: PackedTensor, size: list[int]) -> Iterator[int]:
    known = prod(each for each in size if each != -1)
    yield from (packed.numel() // max(known, 1) if each == -1 else each for each in size)


_KNOWN: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.slice.Tensor: _slice,
    _aten.select.int: _leading,
    _aten.unbind.int: _leading,
    _aten.split.Tensor: _leading,
    _aten.split_with_sizes.default: _leading,
    _aten.unsqueeze.default: _unsqueezed,
    _aten.view.default: _viewed,
}
