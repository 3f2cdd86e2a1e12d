"""Launch plans of the 4-bit products: which kernel, tile, split and ring for one shape on one device.

Everything follows from `DeviceProps` and the shape through a small model of time, so no card's constants are
needed and a plan can be tested without a GPU. `Plan.text` says in words what was chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from fourbit.backends.gpu.device import DeviceProps
from fourbit.backends.gpu.spec import KernelSpec

TABLE_BYTES = 32768
"""Of the kernels' decoding table in shared memory."""

RESERVED_BYTES = 1024
"""Shared memory that the driver keeps of each block's."""

MIN_ARCH = 80
"""From this compute capability on there are 16-byte asynchronous copies and bfloat16 products."""

CLUSTER_ARCH = 90
"""From this one on blocks can form a cluster."""

FUSED_ROWS = 64
"""Rows of x that one pass of the fused kernel takes at most."""


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
    """

    rt: int
    nt: int
    wr: int
    wk: int
    kw: int
    stages: int
    split: int
    resident: bool

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


@dataclass(frozen=True)
class Shape:
    """A product as plans see it: x [m, k], weight [n, k], `experts` of them."""

    m: int
    n: int
    k: int
    dtype: int
    blocksize: int
    nested: bool
    experts: int = 0


@dataclass(frozen=True)
class Plan:
    """How to launch one product.

    Attributes:
        spec: the kernel.
        grid: blocks.
        threads: of a block.
        shared_bytes: dynamic shared memory of a block.
        range_rows: rows of the weight that a block owns.
        pass_rows: of those, how many it works on at a time.
        text: what was chosen and why, one line.
    """

    spec: KernelSpec
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    range_rows: int
    pass_rows: int
    text: str


def fits_fused(props: DeviceProps, shape: Shape) -> bool:
    """Whether the fused kernel can take the shape at all; alignment of the tensors is the caller's to check."""
    return (
        props.arch >= MIN_ARCH
        and shape.dtype != 0
        and shape.k % 64 == 0
        and shape.k % shape.blocksize == 0
        and shape.n * shape.k // shape.blocksize < 1 << 40
    )


def shared_bytes(shape: Shape, tile: Tile) -> int:
    """Dynamic shared memory of linear_mma.cu, in bytes."""
    rows = 16 * tile.rt
    even = shape.k % tile.kw == 0
    scales = max(1, tile.kw // shape.blocksize)
    slot = rows * tile.kw // 2 + rows * scales * 4 + (8 * (1 if even else 2) * rows if shape.nested else 0)
    ring = tile.wr * tile.wk * tile.stages * slot
    columns = 8 * tile.nt
    sums = tile.wk * columns * (tile.rows + 4) * 4
    base = TABLE_BYTES + (1024 if shape.nested else 0)
    if tile.resident:
        steps = -(-steps_in_all(shape, tile) // tile.split)
        return base + ring + (2 * steps * tile.slice + 16) * min(shape.m, columns) + sums
    return base + max(ring + tile.stages * columns * (2 * tile.slice + 16), sums)


def steps_in_all(shape: Shape, tile: Tile) -> int:
    """Slices of the block's warps in a row."""
    return -(-shape.k // tile.slice)


def geometry(props: DeviceProps, shape: Shape, tile: Tile) -> tuple[int, int, int]:
    """`(blocks, range_rows, pass_rows)`: every block at once on the device, with nearly equal shares of the rows."""
    tiles = -(-shape.n // 16)
    slots = max(props.sm_count // tile.split, 1)
    if shape.experts:
        slots = -(-slots // min(shape.experts, max(shape.m, 1)))
    share = -(-tiles // slots)
    passes = -(-share * 16 // tile.rows)
    return -(-tiles // share) * tile.split, share * 16, -(-share // passes) * 16


def candidates(props: DeviceProps, shape: Shape) -> Iterator[Tile]:
    """Tiles that fit the device, in the order of preference among equals."""
    per_expert = -(-shape.m // shape.experts) if shape.experts else shape.m
    nt = next((nt for nt in (1, 2, 4) if per_expert <= 8 * nt), 8)
    splits = (1, 2) if props.arch >= CLUSTER_ARCH and not shape.experts and nt >= 2 else (1,)
    limit = props.shared_per_block - RESERVED_BYTES
    for rt, wr, wk in _WARPS:
        if rt * nt >= 8 and wr * wk > 8:  # registers
            continue
        for kw in (256, 128, 64):
            for stages in (3, 2):
                for split in splits:
                    for resident in (True, False) if shape.m <= 8 and not shape.experts else (False,):
                        tile = Tile(rt, nt, wr, wk, kw, stages, split, resident)
                        if split <= steps_in_all(shape, tile) and shared_bytes(shape, tile) <= limit:
                            yield tile


_WARPS = ((1, 4, 4), (2, 2, 4), (1, 2, 8), (1, 7, 2), (1, 2, 4), (1, 4, 2), (1, 8, 2), (2, 4, 2), (2, 1, 8), (2, 7, 1))
"""(rt, wr, wk) worth trying: 7 to 16 warps."""


def cost(props: DeviceProps, shape: Shape, tile: Tile) -> float:
    """Estimated microseconds; right in its comparisons more than in its values."""
    blocks, range_rows, pass_rows = geometry(props, shape, tile)
    passes = -(-range_rows // pass_rows)
    steps = -(-steps_in_all(shape, tile) // tile.split)
    bandwidth = (props.bandwidth or 15.0 * props.sm_count) * 900.0  # bytes per microsecond that can be reached
    per_sm = bandwidth / props.sm_count
    # what the most loaded block moves from memory, and x from the second-level cache, about twice as fast
    weight = range_rows * steps * tile.slice * (0.5 + (1 if shape.nested else 4) / shape.blocksize)
    columns = min(shape.m, 8 * tile.nt)
    x_reads = (1 if tile.resident else passes) * steps * tile.slice * 2 * columns
    memory = (weight + 0.4 * x_reads) / per_sm
    # cycles of the shared memory for 1024 weights: bytes and table 25, x's fragments, x's copies
    groups = passes * steps * tile.rows * tile.slice / 1024
    used = range_rows / (passes * tile.rows)
    fragment = (4 if shape.m <= 4 else 8) * tile.nt / tile.rt
    wavefronts = groups * used * (25 + fragment + 10 * tile.nt * 16 / pass_rows)
    few = 1.35 if tile.threads <= 256 and tile.rt == 1 else 1.0  # warps that can hide each other's waits
    compute = wavefronts * few / 1400.0
    fixed = 0.35 * passes + (0.4 if tile.resident else 0.2 + 0.06 * passes * steps) + 0.6 * (tile.split > 1)
    if tile.stages < 3:
        memory *= 1.2
    if tile.kw < 256:
        memory *= 1.05
    return memory + 0.35 * compute + fixed if memory > compute else compute + 0.35 * memory + fixed


@lru_cache(maxsize=4096)
def plan_linear(props: DeviceProps, shape: Shape) -> Plan | None:
    """The plan of the fused kernel for a shape, or None where it cannot run."""
    if not fits_fused(props, shape):
        return None
    best = min(candidates(props, shape), key=lambda tile: cost(props, shape, tile), default=None)
    return None if best is None else make_plan(props, shape, best)


def make_plan(props: DeviceProps, shape: Shape, tile: Tile) -> Plan:
    """The plan for one tile."""
    blocks, range_rows, pass_rows = geometry(props, shape, tile)
    spec = KernelSpec.of(
        "linear_mma.cu",
        "linear_mma",
        {
            "DTYPE": shape.dtype,
            "BLOCKSIZE": shape.blocksize,
            "NESTED": int(shape.nested),
            "RT": tile.rt,
            "NT": tile.nt,
            "WR": tile.wr,
            "WK": tile.wk,
            "KW": tile.kw,
            "STAGES": tile.stages,
            "SPLIT": tile.split,
            "RESIDENT": int(tile.resident),
            "EVEN": int(shape.k % tile.kw == 0),
            "GROUPED": int(shape.experts > 0),
        },
        min_arch=MIN_ARCH,
    )
    layers = shape.experts or -(-shape.m // (8 * tile.nt))
    text = (
        f"fused decode and matrix units: {blocks * layers} blocks of {tile.threads} threads on {props.sm_count}"
        f" multiprocessors, {range_rows} rows each in passes of {pass_rows}, K split over {tile.wk * tile.split}"
        f" (warps {tile.wk}, cluster {tile.split}), {8 * tile.nt} rows of x at a time"
        f" {'kept in' if tile.resident else 'streamed through'} shared memory, ring of {tile.stages} x {tile.kw}"
    )
    used = shared_bytes(shape, tile)
    return Plan(spec, (blocks, layers, 1), tile.threads, used, range_rows, pass_rows, text)


# ---- decode a piece, then torch's matmul ----------------------------------------------------------------------

FUSED_PASSES = 2
"""Passes of FUSED_ROWS rows up to which decoding again costs less than writing 16-bit weights to memory."""


def use_fused(shape: Shape) -> bool:
    """Whether so few rows of x are better served by the fused kernel."""
    return shape.m <= FUSED_ROWS * FUSED_PASSES


def piece_columns(props: DeviceProps, m: int, columns: int, inner: int, itemsize: int, *, whole: bool) -> int:
    """How many of `columns` output columns to decode at a time, `inner` weights each.

    A piece should stay in the second-level cache, but be wide enough for matmul to fill the device; with
    `whole` False never more than half of the columns of a weight that is larger than a cache.
    """
    cached = props.l2_bytes // 2 // (inner * itemsize)
    filled = 2 * props.sm_count * 128 * 128 // max(m, 1)
    width = max(cached, filled, 128)
    if not whole and columns * inner * itemsize > props.l2_bytes:
        width = min(width, -(-columns // 2))
    width = -(-width // 128) * 128
    pieces = -(-columns // width)
    return min(columns, -(-columns // pieces // 128) * 128)
