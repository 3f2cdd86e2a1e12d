"""Moving rows of packed weights as transformers moves those of 16-bit ones, without a change of value.

transformers stacks, splits, fuses and permutes tensors between a folder and a model, by operations on their
dimensions. A packed weight goes through them as a stand-in: a tensor of its shape but for the last dimension, which
is 2 (older versions drop dimensions of 1), that holds a number for each row, and the next. What comes out says which
rows the result is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from fourbit.scales import NESTED_BLOCKSIZE
from fourbit.state import QuantState

_TAG = 1 << 62
_STEP = 1_000_003
"""Rows are numbered in steps, so that what comes out of arithmetic is known not to be a row."""


class Packed(NamedTuple):
    """A packed weight and its state."""

    codes: Tensor
    state: QuantState


class _Piece(NamedTuple):
    """Rows `start` to `end` of one weight."""

    weight: int
    start: int
    end: int


class _Span(NamedTuple):
    """The same in elements, or in blocks."""

    weight: int
    start: int
    end: int


class Rows:
    """The stand-ins of some packed weights, and the way back."""

    def __init__(self) -> None:
        self._weights: list[Packed] = []
        self._firsts: list[int] = [0]

    def stand_in(self, weight: Packed) -> Tensor:
        """An int64 tensor [*shape[:-1], 2], on the CPU, in the place of a weight."""
        shape = weight.state.shape
        count = prod(shape[:-1])
        numbers = torch.arange(self._firsts[-1], self._firsts[-1] + count) * _STEP + _TAG
        self._weights.append(weight)
        self._firsts.append(self._firsts[-1] + count)
        return torch.stack((numbers, numbers + 1), -1).view(*shape[:-1], 2)

    @staticmethod
    def is_stand_in(tensor: Tensor) -> bool:
        """Whether a tensor has to do with a stand-in, whatever has become of it."""
        return tensor.dtype is torch.int64 and tensor.numel() > 0 and int(tensor.max()) >= _TAG

    def sources(self, tensor: Tensor) -> set[int]:
        """Which weights, in the order of `stand_in`, had part in what came out."""
        rows = ((tensor.reshape(-1) - _TAG) // _STEP).clamp(0, self._firsts[-1] - 1)
        firsts = torch.tensor(self._firsts)
        return {int(i) for i in torch.unique(torch.searchsorted(firsts, rows, right=True) - 1)}

    def weight(self, tensor: Tensor) -> Packed | None:
        """The packed weight that came out; None if it is not made of whole blocks of like weights, in whole rows."""
        if tensor.dim() < 2 or tensor.shape[-1] != 2 or not torch.equal(tensor[..., 0] + 1, tensor[..., 1]):
            return None
        numbers = tensor[..., 0].reshape(-1) - _TAG
        rows = numbers // _STEP
        if bool((numbers % _STEP != 0).any()) or not 0 <= int(rows.min()) <= int(rows.max()) < self._firsts[-1]:
            return None
        pieces = self._pieces(rows)
        first = self._weights[pieces[0].weight].state
        shape = torch.Size((*tensor.shape[:-1], first.shape[-1]))
        if len(pieces) == 1 and shape == first.shape:
            return self._weights[pieces[0].weight]
        used = {piece.weight: self._weights[piece.weight] for piece in pieces}
        if not all(_alike(first, each.state) for each in used.values()):
            return None
        spans = [_Span(piece.weight, *(row * shape[-1] for row in piece[1:])) for piece in pieces]
        # blocks may run from one row into the next, as long as none is torn: the last may be short
        torn = [span.start % first.blocksize for span in spans] + [span.end % first.blocksize for span in spans[:-1]]
        return None if any(torn) else _joined(used, spans, shape)

    def _pieces(self, rows: Tensor) -> list[_Piece]:
        """Runs of rows that follow one another in one weight."""
        firsts = torch.tensor(self._firsts)
        owner = torch.searchsorted(firsts, rows, right=True) - 1
        breaks = torch.nonzero((rows.diff() != 1) | (owner.diff() != 0)).reshape(-1) + 1
        starts = [0, *breaks.tolist()]
        ends = [*breaks.tolist(), len(rows)]
        found = []
        for start, end in zip(starts, ends, strict=True):
            weight = int(owner[start])
            first = int(rows[start]) - self._firsts[weight]
            found.append(_Piece(weight, first, first + end - start))
        return found


def _joined(used: dict[int, Packed], spans: Sequence[_Span], shape: torch.Size) -> Packed:
    """One weight of `shape` from parts of others, end to end."""
    first = used[spans[0].weight].state
    codes = torch.cat([used[i].codes.reshape(-1)[start // 2 : (end + 1) // 2] for i, start, end in spans])
    blocks = [_Span(i, start // first.blocksize, -(-end // first.blocksize)) for i, start, end in spans]
    nested = _kept_nested(used, blocks)
    scales = {i: each.state.scales() if nested is None else each.state.absmax for i, each in used.items()}
    absmax = torch.cat([scales[i][start:end] for i, start, end in blocks])
    if nested is not None:
        return Packed(codes, replace(first, absmax=absmax, shape=shape, nested_absmax=nested))
    return Packed(codes, QuantState(absmax, shape, first.code, first.blocksize, first.quant_type, first.dtype))


def _alike(a: QuantState, b: QuantState) -> bool:
    mine, theirs = ((s.blocksize, s.quant_type, s.dtype, s.shape[-1], s.device) for s in (a, b))
    return mine == theirs


def _kept_nested(used: dict[int, Packed], blocks: Sequence[_Span]) -> Tensor | None:
    """The scales' scales where the parts can keep theirs; None: the scales have to be decoded.

    They can if all have the same table and offset, and each but the last is made of whole groups of scales.
    """
    states = {i: each.state for i, each in used.items()}
    first = next(iter(states.values()))
    for state in states.values():
        if state.nested_absmax is None or first.nested_offset is None:
            return None
        assert state.nested_code is not None and state.nested_offset is not None and first.nested_code is not None
        if not torch.equal(state.nested_code, first.nested_code):
            return None
        if not torch.equal(state.nested_offset, first.nested_offset):
            return None
    groups = []
    for place, (weight, start, end) in enumerate(blocks):
        whole = end % NESTED_BLOCKSIZE == 0 or place == len(blocks) - 1
        if start % NESTED_BLOCKSIZE or not whole:
            return None
        nested = states[weight].nested_absmax
        assert nested is not None
        groups.append(nested[start // NESTED_BLOCKSIZE : -(-end // NESTED_BLOCKSIZE)])
    return torch.cat(groups)
