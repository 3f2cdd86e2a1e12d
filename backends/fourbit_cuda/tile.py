"""The shape of a product, the tile of linear_mma.cu that works on it, and the shared memory that a block then has.

The layout of shared memory is written here alone: the kernel is compiled with `Layout.defines`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Shape:
    """A product as plans see it: x [m, k], weight [n, k], `experts` of them; `transposed`: x [m, n], the gradient."""

    m: int
    n: int
    k: int
    dtype: int
    blocksize: int
    nested: bool
    experts: int = 0
    transposed: bool = False

    def groups(self, columns: int) -> float:
        """Groups of at most `columns` rows of x, of one expert each; as many as are to be expected if each row's expert
        is a random one."""
        if not self.experts:
            return -(-self.m // columns)
        rows = self.m / self.experts
        return self.experts * -math.expm1(-rows) * max(1.0, rows / columns + 0.5)


@dataclass(frozen=True)
class Tile:
    """Compile-time choices of linear_mma.cu.

    Attributes:
        rt: m16 tiles of the weight's rows per warp.
        nt: n8 tiles of x's rows.
        wr: warps side by side over the weight's rows.
        wk: warps that share rows and split the inner dimension.
        kw: elements of a row that a warp takes at a time.
        stages: slots of each warp's ring.
        split: blocks of a cluster that share rows and split the inner dimension.
        resident: whether all of x stays in shared memory.
        wgmma: whether groups of four warps multiply on sm_90a's asynchronous unit.
        wide: whether the decoding table has the wide layout.
    """

    rt: int
    nt: int
    wr: int
    wk: int
    kw: int
    stages: int
    split: int
    resident: bool
    wgmma: bool = False
    wide: bool = False

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.wr * self.wk

    @property
    def rows(self) -> int:
        """Rows of the weight that a block works on at a time."""
        return 16 * self.rt * self.wr

    @property
    def slice(self) -> int:
        """Elements of a row that the block's warps take side by side."""
        return self.wk * self.kw

    @property
    def columns(self) -> int:
        """Rows of x that a block takes at a time."""
        return 8 * self.nt

    def steps(self, k: int) -> int:
        """Slices of the block's warps in a row of `k` elements."""
        return -(-k // self.slice)


class Layout(NamedTuple):
    """A block's dynamic shared memory: offsets from its start and distances, in bytes; see ring.h for what lies there.

    The table comes first. A warp's slot holds rows of the weight in the ring, and beside the ring a "side" with their
    scales, where these are double-quantized also the words with their codes and the nested scales.

    Attributes:
        scales: of a row's slice.
        words: with the codes of a row's scales.
        nested_words: nested scales of a row's slice.
        entry_bytes: between entries of the table. In the wide layout one byte permutation makes an address.
        row_stride: between rows of a slot. In the wide layout they take the other halves of the table's entries, and
            go on in pairs of stages behind the table.
        inside: stages that lie in the table.
        ring_offset: the ring, or what of it is not in the table.
        sides_offset: the sides.
        side_codes: of codes, in a side.
        side_nested: of nested scales, in a side.
        side_bytes: of a side.
        codes_offset: the table of nested_code.
        barriers_offset: of x's slots.
        x_offset: x, and the sums of the block's warps: behind it where all of x stays, else in its place.
        x_pad: beside a row of x. 16 past a multiple of 32: no bank conflicts.
        sum_stride: floats between rows of sums.
        total: of all.
    """

    scales: int
    words: int
    nested_words: int
    entry_bytes: int
    row_stride: int
    inside: int
    ring_offset: int
    sides_offset: int
    side_codes: int
    side_nested: int
    side_bytes: int
    codes_offset: int
    barriers_offset: int
    x_offset: int
    x_pad: int
    sum_stride: int
    total: int

    @classmethod
    def of(cls, shape: Shape, tile: Tile) -> Layout:
        """That of a block of `tile` for `shape`."""
        rows, warps = 16 * tile.rt, tile.wr * tile.wk
        even = shape.k % tile.kw == 0
        scales = max(1, tile.kw // shape.blocksize)
        # where a row's codes do not begin at a word, they and their nested scales take one more
        words = (scales + 3) // 4 if even else (scales + 6) // 4
        nested_words = 1 if even or scales == 1 else 2
        everyone = warps * rows
        entry_bytes, row_stride = (256, 256) if tile.wide else (128, tile.kw // 2)
        inside = 256 // everyone if tile.wide else 0
        ring = 256 * entry_bytes
        outside = tile.stages - inside
        slots = -(-max(outside, 0) // 2) if tile.wide else outside
        sides = ring + slots * everyone * row_stride
        side_codes = 4 * rows * scales
        side_nested = side_codes + 4 * rows * words
        side_bytes = side_nested + 4 * rows * nested_words if shape.nested else side_codes
        codes = sides + tile.stages * warps * side_bytes
        barriers = codes + (1024 if shape.nested else 0)
        x = barriers + 64
        x_pad = 0 if tile.wgmma else 16
        sum_stride = tile.rows + 4
        sums = tile.wk * tile.columns * sum_stride * 4
        if tile.resident:
            steps = -(-tile.steps(shape.k) // tile.split)
            total = x + (2 * steps * tile.slice + x_pad) * min(shape.m, tile.columns) + sums
        else:
            total = x + max(tile.stages * tile.columns * (2 * tile.slice + x_pad), sums)
        return cls(
            *(scales, words, nested_words, entry_bytes, row_stride, inside, ring, sides, side_codes, side_nested),
            *(side_bytes, codes, barriers, x, x_pad, sum_stride, total),
        )

    def defines(self) -> dict[str, int]:
        """What the kernel is compiled with; the total is for its launch."""
        return {name.upper(): value for name, value in self._asdict().items() if name != "total"}
