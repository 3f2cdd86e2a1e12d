"""Launch plans of the 4-bit products: which kernel, tile, split and ring for one shape on one device.

Everything follows from `DeviceProps` and the shape through a small model of time, so no card's constants are
needed and a plan can be tested without a GPU. `Plan.text` says in words what was chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from fourbit_cuda.tile import Layout, Shape, Tile
from fourbit_gpu.device import DeviceProps
from fourbit_gpu.spec import KernelSpec

MIN_ARCH = 80
"""From this compute capability on there are 16-byte asynchronous copies and bfloat16 products."""

CLUSTER_ARCH = 90
"""From this one on blocks can form a cluster."""

WGMMA_ARCH = 90
"""The one that has wgmma; later ones replaced it."""

WIDE_BYTES = 200 << 10
"""Shared memory from which the wide layout of the decoding table pays."""

FUSED_ROWS = 64
"""Rows of x that one pass of the fused kernel takes at most."""


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
        arrange: the kernel that lays x out first, if the plan needs one, and the bytes of its result.
        microseconds: estimated, by a formula fitted to measurements on an H100.
        text: what was chosen and why, one line.
    """

    spec: KernelSpec
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    range_rows: int
    pass_rows: int
    arrange: tuple[KernelSpec, int] | None
    microseconds: float
    text: str


def fits_fused(props: DeviceProps, shape: Shape) -> bool:
    """Whether the fused kernel can take the shape at all; alignment of the tensors is the caller's to check."""
    return (
        props.arch >= MIN_ARCH
        and shape.dtype != 0
        and shape.k % 64 == 0
        and shape.k % shape.blocksize == 0
        and max(shape.experts, 1) * shape.n * shape.k // shape.blocksize < 1 << 31
        and shape.m < 1 << 31
    )


def busy_experts(shape: Shape) -> int:
    """At most so many experts have rows."""
    return min(shape.experts, max(shape.m, 1))


def geometry(props: DeviceProps, shape: Shape, tile: Tile) -> tuple[int, int, int]:
    """`(blocks, range_rows, pass_rows)`: every block at once on the device, with nearly equal shares of the rows."""
    tiles = -(-shape.n // 16)
    slots = max(props.sm_count // tile.split, 1)
    if shape.experts:
        slots = -(-slots // busy_experts(shape))
    share = -(-tiles // slots)
    passes = -(-share * 16 // tile.rows)
    return -(-tiles // share) * tile.split, share * 16, -(-share // passes) * 16


def candidates(props: DeviceProps, shape: Shape) -> Iterator[Tile]:
    """Tiles that fit the device, in the order of preference among equals."""
    per_expert = -(-shape.m // shape.experts) if shape.experts else shape.m
    nt = next((nt for nt in (1, 2, 4) if per_expert <= 8 * nt), 8)
    wide = props.shared_per_block >= WIDE_BYTES
    splits = (1, 2) if props.arch >= CLUSTER_ARCH and not shape.experts and nt >= 2 else (1,)
    units: tuple[bool, ...] = (False,)
    if props.arch == WGMMA_ARCH and not shape.experts and nt >= 2:
        # from 17 rows on a warp's own products were slower on every shape
        units = (False, True) if nt == 2 else (True,)
    places = (True, False) if nt == 1 and not shape.experts else (False,)
    for wgmma in units:
        for rt, wr, wk in _GROUPS if wgmma else _WARPS:
            if not wgmma and _spills(shape, rt, nt, wr, wk):
                continue
            for kw in (256,) if wide else (256, 128, 64):
                for stages in (3, 4, 2):
                    for split in splits:
                        if split > 1 and nt == 8 and wr * wk > 8:  # registers
                            continue
                        for resident in places:
                            tile = Tile(rt, nt, wr, wk, kw, stages, split, resident, wgmma, wide)
                            fits = Layout.of(shape, tile).total <= props.shared_per_block
                            if fits and split <= tile.steps(shape.k):
                                yield tile


def _spills(shape: Shape, rt: int, nt: int, wr: int, wk: int) -> bool:
    """Whether a warp's own products want more registers than so many warps leave, by NVRTC 12.8 and 13.5."""
    fine = shape.blocksize == 32  # two sums for each part
    if wr * wk <= 8:
        return fine and (rt * nt == 16 or (rt, wr, wk) == (2, 1, 4))
    if nt == 1:
        return fine
    return rt * nt >= 8 or rt > 1 or fine or (shape.nested if nt == 2 else wr * wk == 12)


_WARPS = (
    *((1, 4, 4), (2, 2, 4), (1, 2, 8), (1, 8, 2), (1, 7, 2), (1, 2, 4), (1, 4, 2), (2, 4, 2), (2, 1, 8), (2, 7, 1)),
    *((2, 2, 2), (1, 3, 4), (1, 6, 2), (2, 1, 4), (2, 6, 2), (2, 7, 2)),
)
"""(rt, wr, wk) worth trying: 4 to 16 warps."""

_GROUPS = ((1, 16, 1), (1, 8, 2), (1, 8, 1), (1, 4, 2), (2, 8, 1), (2, 4, 2), (1, 4, 4), (1, 4, 3))
"""The same where four warps multiply together."""


def cost(props: DeviceProps, shape: Shape, tile: Tile) -> float:
    """Estimated microseconds; right in its comparisons more than in its values.

    The constants are fitted to 64 products of 1 to 64 rows with all their tiles on an H100, 11 on an H200 and 15 of
    experts: what it chooses takes 2 % longer than the best of them, 12 % at most, of experts 5 and 22 %.
    """
    _, range_rows, pass_rows = geometry(props, shape, tile)
    passes = -(-range_rows // pass_rows)
    steps = -(-tile.steps(shape.k) // tile.split)
    columns = min(shape.m, tile.columns)
    # what the most loaded block moves from memory; many rows of x come from the second-level cache beside it
    bandwidth = (props.bandwidth or 15.0 * props.sm_count) * 764.0  # bytes per microsecond that can be reached
    moved = range_rows * steps * tile.slice * (0.5 + (1 if shape.nested else 4) / shape.blocksize)
    if tile.wgmma:
        moved += 0.15 * passes * steps * tile.slice * columns
    memory = moved / (bandwidth / props.sm_count)
    # cycles for 1024 weights: of a multiprocessor that is busy, and of a warp by itself, whose instructions wait for
    # one another; warps with two tiles of rows have more of them that do not
    if tile.wgmma:
        together, alone, height = 8.8, 54.0 + 22.7 * tile.nt, 64 * tile.rt
    else:
        together = 9.2 + (6.6 if shape.m <= 4 else 2.4 * tile.nt) / tile.rt
        alone, height = 33.0 + (100.0 + 12.2 * tile.nt) / tile.rt, 16 * tile.rt
    if not tile.wide:
        together += 14.0
    rows = -(-range_rows // height) * height
    busy = rows * steps * tile.slice / 1024 * together / 1750.0
    longest = passes * steps * 16 * tile.rt * tile.kw / 1024 * alone / 1750.0
    compute = max(busy, longest)
    fixed = 1.11 * passes + 0.043 * (tile.split > 1) + 0.025 * tile.wk + 0.0076 * tile.threads / 32
    fixed += 0.0023 * columns * passes * tile.wk * min(tile.rows, range_rows) / tile.threads  # adding up sums
    if tile.wgmma:
        fixed += 0.26 + 0.033 * passes * steps + 0.037 * (tile.stages > 2) + 0.12 * (tile.stages > 3)
    else:
        fixed += 0.19 if tile.resident else 0.018 * passes * steps
        fixed += {2: 0.17, 3: 0.0}.get(tile.stages, 0.12)
    return max(memory, compute) + 0.41 * min(memory, compute) + fixed


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
    layout = Layout.of(shape, tile)
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
            "WGMMA": int(tile.wgmma),
            "WIDE": int(tile.wide),
            **layout.defines(),
        },
        package="fourbit_cuda",
        arch_specific=tile.wgmma,
    )
    layers = busy_experts(shape) if shape.experts else -(-shape.m // tile.columns)
    arrange = None
    if tile.wgmma:
        defines = {"BLOCKSIZE": shape.blocksize, "COLUMNS": tile.columns, "DTYPE": shape.dtype}
        padded = -(-shape.k // tile.kw) * tile.kw
        arrange = (
            KernelSpec.of("arrange_x.cu", "arrange_x", defines, package="fourbit_cuda"),
            layers * tile.columns * padded * 2,
        )
    text = (
        f"fused decode and {'wgmma' if tile.wgmma else 'mma'}: {blocks * layers} blocks of {tile.threads} threads"
        f" on {props.sm_count} multiprocessors, {range_rows} rows each in passes of {pass_rows},"
        f" K split over {tile.wk * tile.split} (warps {tile.wk}, cluster {tile.split}),"
        f" {tile.columns} rows of x at a time {'kept in' if tile.resident else 'streamed through'} shared memory,"
        f" ring of {tile.stages} x {tile.kw}"
    )
    estimate = cost(props, shape, tile)
    if tile.wgmma:  # in fact: what the estimate leaves out
        time = 1.19 * estimate - 0.7 if tile.nt == 8 else 0.93 * estimate - 2.1
    else:
        time = 0.88 * estimate - 1.5
    if shape.experts:  # some have more rows than others, and the last blocks are few
        time = 4.0 + max(1.0, 1.47 * blocks * shape.groups(tile.columns) / props.sm_count) * time
    else:
        time = layers * (time + (8.0 if tile.wgmma else 4.0))
    return Plan(spec, (blocks, layers, 1), tile.threads, layout.total, range_rows, pass_rows, arrange, time, text)
