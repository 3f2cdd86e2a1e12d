"""Cut: the part of a packed matrix that one of several processes multiplies by, and what it needs of the storage.

Codes and scales are cut as they lie, and nothing is quantized anew. A border may run through a block: the part then has
smaller blocks, which share the block's scale. It may run through a group of 256 double-quantized scales: the part's
scales are decoded to float32. Where blocks run across rows in a way that no part can have, the storage stays whole and
the computation alone is divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from fourbit import scales
from fourbit.checks import MIN_BLOCKSIZE
from fourbit.float_environment import subnormals_kept
from fourbit.scales import NESTED_BLOCKSIZE
from fourbit.weight import Weight


@dataclass(frozen=True)
class Cut:
    """Part `part` of `parts` of a weight [out, in], by rows (`dim` 0) or columns (`dim` 1).

    Parts are as torch.chunk makes them, the last ones shorter or empty.

    Attributes:
        start, stop: the rows or columns of the part.
        before, after: rows or columns beside these that the part's weight has, too: the product's rows are dropped, the
            input's columns are zeros.
        blocksize: of the part's weight.
        codes, scales: whether a process holds its part of them alone, and not the whole.
        nested: whether the part's scales are codes, as the weight's are.
    """

    shape: tuple[int, int]
    whole_blocksize: int
    dim: int
    part: int
    parts: int
    start: int
    stop: int
    before: int
    after: int
    blocksize: int
    codes: bool
    scales: bool
    nested: bool
    whole_nested: bool

    @classmethod
    def of(cls, shape: tuple[int, int], blocksize: int, nested: bool, dim: int, parts: int, part: int) -> Cut:
        """The cut of a weight of that shape, blocksize and, if `nested`, double-quantized scales."""
        size, inner = shape[dim], shape[1]
        step = -(-size // parts)
        start, stop = min(part * step, size), min((part + 1) * step, size)
        common = gcd(inner, blocksize)  # all blocks of all rows begin and end at multiples of it
        borders = [min(i * step, size) for i in range(1, parts)]
        before = after = 0
        if common == blocksize and not (dim and any(border % blocksize for border in borders)):
            mine, codes, own = blocksize, True, True
        elif common >= MIN_BLOCKSIZE and not (dim and any(border % 2 for border in borders)):
            mine, codes, own = common, True, False
            while dim and mine > MIN_BLOCKSIZE and any(border % mine for border in borders):
                mine //= 2
            if dim:
                before, after = start % mine, -stop % mine
        elif dim:
            mine, codes, own, before, after = blocksize, False, False, start, size - stop
        else:
            period = blocksize // common  # rows until one begins with a block again
            mine, codes, own = blocksize, False, False
            before, after = start % period, min(-stop % period, size - stop)
        if start == stop:
            before = after = 0
        first, last = ((edge * inner) // blocksize for edge in (start - before, stop + after))
        grouped = first % NESTED_BLOCKSIZE == 0 and (last % NESTED_BLOCKSIZE == 0 or stop + after == size)
        whole = not codes and dim == 1
        kept = nested and mine == blocksize and (whole or (dim == 0 and grouped))
        facts = (shape, blocksize, dim, part, parts, start, stop, before, after, mine, codes, own, kept, nested)
        return cls(*facts)

    @property
    def empty(self) -> bool:
        """Whether there is nothing left for this part."""
        return self.start == self.stop

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the part's weight."""
        extent = self.before + self.stop - self.start + self.after
        return (extent, self.shape[1]) if self.dim == 0 else (self.shape[0], extent)

    def weight(self, whole: Weight) -> Weight:
        """The part's weight; of `whole` the codes and scales are the part's alone where `codes` and `scales` say so."""
        packed, absmax = self._codes(whole.packed), whole.absmax
        if self.nested:
            first, last = self._blocks()
            a, b, c = whole[4:]
            assert a is not None
            if self.dim == 0:
                a = a.reshape(-1)[first // NESTED_BLOCKSIZE : -(-last // NESTED_BLOCKSIZE)]
                absmax = absmax if self.scales else absmax.reshape(-1)[first:last]
            return Weight(packed, absmax, whole.code, self.blocksize, a, b, c)
        return Weight(packed, self._scales(whole), whole.code, self.blocksize)

    def _blocks(self) -> tuple[int, int]:
        """The part's blocks among those of the weight, for a part of rows."""
        inner, size = self.shape[1], self.whole_blocksize
        return (self.start - self.before) * inner // size, -(-(self.stop + self.after) * inner // size)

    def _codes(self, packed: Tensor) -> Tensor:
        if self.codes:
            if not self.before and not self.after:
                return packed
            return torch.nn.functional.pad(packed, (self.before // 2, self.after // 2))
        if self.dim:
            return packed
        inner = self.shape[1]  # a period of rows has whole blocks, and so whole bytes
        return packed.reshape(-1)[(self.start - self.before) * inner // 2 : ((self.stop + self.after) * inner + 1) // 2]

    def _scales(self, whole: Weight) -> Tensor:
        """float32 scales of the part."""
        nested = whole[4:]
        device = whole.absmax.device
        out, inner = self.shape
        rows = (self.start - self.before, self.stop + self.after) if self.dim == 0 else (0, out)
        if self.scales:
            if self.dim == 0:
                return scales.decode(whole.absmax, *nested, first=self._blocks()[0])
            per_row = inner // self.whole_blocksize
            number = torch.arange(out, device=device)[:, None] * per_row + self.start // self.whole_blocksize
            number = number + torch.arange(whole.absmax.shape[-1], device=device)
            return _decoded(whole, number, whole.absmax)
        if self.dim == 0 and self.blocksize == self.whole_blocksize:
            first, last = self._blocks()
            return scales.decode(whole.absmax.reshape(-1)[first:last], *nested, first=first)
        if self.dim and not self.codes:
            return scales.decode(whole.absmax, *nested)
        columns = (0, inner) if self.dim == 0 else (self.start - self.before, self.stop + self.after)
        elements = torch.arange(*rows, device=device)[:, None] * inner
        elements = elements + torch.arange(columns[0], columns[1], self.blocksize, device=device)
        number = elements // self.whole_blocksize
        return _decoded(whole, number, whole.absmax.reshape(-1)[number])

    def words(self) -> str:
        """What a process of it has, in a sentence."""
        what = "rows" if self.dim == 0 else "columns"
        text = f"{what} {self.start} to {self.stop} of {self.shape[self.dim]}, part {self.part + 1} of {self.parts}"
        if not self.codes:
            text += f"; storage whole on each, as blocks of {self.whole_blocksize} run across rows of {self.shape[1]}"
        elif self.blocksize != self.whole_blocksize:
            text += f"; a border runs through blocks of {self.whole_blocksize}: here they are of {self.blocksize}"
        if self.whole_nested and not self.nested:
            text += f"; scales decoded to float32, as a border runs through groups of {NESTED_BLOCKSIZE} of them"
        return text


def _decoded(whole: Weight, number: Tensor, absmax: Tensor) -> Tensor:
    """float32 scales from `absmax`, of which each has its `number` among the whole weight's."""
    if whole.nested_absmax is None:
        return absmax.contiguous()
    assert whole.nested_code is not None and whole.nested_offset is not None
    group = whole.nested_absmax.reshape(-1)[number // NESTED_BLOCKSIZE]
    return _combined(whole.nested_code[absmax.int()], group, whole.nested_offset)


@subnormals_kept
def _combined(value: Tensor, group: Tensor, offset: Tensor) -> Tensor:
    return value * group + offset
