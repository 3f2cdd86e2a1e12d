"""Products of many rows on sm_90: plans and launches of matmul_forward.cu, and for gradients matmul_transposed.cu."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from fourbit_cuda.tensor_map import tensor_map
from fourbit_cuda.tile import Shape
from fourbit_gpu.device import DeviceProps
from fourbit_gpu.elementwise import DTYPE_CODES
from fourbit_gpu.launcher import Grid
from fourbit_gpu.spec import KernelSpec

ARCH = 90
"""The one that has wgmma."""

OUTPUTS = 128
"""Outputs of a tile: rows of the weight, or columns of it where it is transposed."""

STEP = 64
"""Elements of the inner dimension at a time."""

BF16 = DTYPE_CODES[torch.bfloat16]

BYTE_TO = 256
"""Bytes of the copies of what a byte stands for."""


@dataclass(frozen=True)
class Block:
    """Compile-time choices of a kernel.

    Attributes:
        columns: rows of x in a tile: 32, 64, 128, 192 or 256.
        split: blocks of a cluster, which share the last tiles: 1 or 2.
        stages: tiles of x on their way; of the gradient, and of the decoded weight.
        weight_stages: pairs of steps of the weight on their way.
        result_columns: rows of x whose results leave at a time.
        decoders: of the gradient: warpgroups that decode for the others. Of a product none: what multiplies decodes.
        bytewise: of a product: whether the weight is decoded by a table of bytes, or by tables of each block's values.
        chunks: of a product: of the four parts of a step, how many are multiplied at a time.
        buffers: of a product: decoded operands of so many parts.
    """

    columns: int
    split: int
    stages: int
    weight_stages: int
    result_columns: int
    decoders: int = 0
    bytewise: bool = False
    chunks: int = 2
    buffers: int = 2

    @property
    def transposed(self) -> bool:
        """Whether it is for gradients."""
        return self.decoders > 0

    @property
    def threads(self) -> int:
        """Of a block: two warpgroups multiply, the others decode, or bring what is multiplied."""
        return 128 * (2 + max(self.decoders, 1))

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that decodes or brings, and of one that multiplies: together what all have at the launch."""
        if not self.transposed:
            return (72, 216) if self.columns > 128 else (88, 208)
        return {1: (88, 208), 2: (112, 144)}[self.decoders]


def block(columns: int, split: int, transposed: bool = False, bytewise: bool | None = None) -> Block:
    """The one for tiles of so many rows of x, with as deep rings as shared memory holds.

    `bytewise`: of a product; None for what is faster where both codes of a byte are bfloat16.
    """
    if transposed:
        stages, weight_stages = {256: (3, 4), 192: (4, 4), 128: (5, 4), 64: (6, 6), 32: (6, 6)}[columns]
        results = 64 if columns == 192 else min(columns, 128)
        # 128 sums a thread leave no registers for two warpgroups of decoders
        return Block(columns, split, stages, weight_stages, results, decoders=1 if columns == 256 else 2)
    stages, weight_stages = {256: (4, 3), 192: (5, 3), 128: (6, 4), 64: (8, 6), 32: (8, 6)}[columns]
    if bytewise is None:
        bytewise = columns <= 192
    if bytewise and columns == 192:
        stages = 4  # beside the table
    chunks = 4 if bytewise or columns == 192 else 2
    return Block(columns, split, stages, weight_stages, min(columns, 64), bytewise=bytewise, chunks=chunks)


BLOCKS = (
    *(block(columns, split) for columns in (256, 192, 128, 64, 32) for split in (1, 2)),
    *(block(columns, split, bytewise=False) for columns in (192, 128) for split in (1, 2)),
    *(block(columns, split, transposed=True) for columns in (256, 192, 128, 64, 32) for split in (1, 2)),
)
"""What plans choose from."""


def suits(shape: Shape, b: Block) -> bool:
    """Whether a kind of block is the one of its size for a shape's direction and dtype."""
    if b.transposed or shape.transposed:
        return b.transposed == shape.transposed
    return b.columns not in (128, 192) or b.bytewise == (shape.dtype == BF16)


class Memory(NamedTuple):
    """A block's dynamic shared memory, offsets in bytes: the ring comes first.

    Attributes:
        weight_at: the packed weight's ring.
        table_at: of bytes.
        results_at: results on their way out.
        barriers_at: of both rings, and of the sums that a cluster's blocks send each other.
        codes_at: the table of nested_code.
        experts_at: of experts' rows.
        total: of all.
    """

    weight_at: int
    table_at: int
    results_at: int
    barriers_at: int
    codes_at: int
    experts_at: int
    total: int

    @classmethod
    def of(cls, shape: Shape, b: Block) -> Memory:
        """That of a block for a shape."""
        pair = OUTPUTS * STEP
        if b.transposed:
            weight = b.stages * (b.columns * STEP * 2 + OUTPUTS * STEP * 2)
        else:  # with a scale or a table for each block of the weight
            weight = b.stages * b.columns * STEP * 2
            pair += max(2 * STEP // shape.blocksize, 1) * OUTPUTS * (4 if b.bytewise else 32)
        table = weight + b.weight_stages * pair
        results = table + (256 * BYTE_TO if b.bytewise else 0)
        barriers = results + 2 * b.result_columns * 128
        codes = barriers + 16 * (b.stages + b.weight_stages) + (b.columns // 4 if b.split > 1 else 0)
        experts = codes + (1024 if shape.nested else 0)
        total = experts + (4 * (3 * shape.experts + 2) if shape.experts else 0)
        return cls(weight, table, results, barriers, codes, experts, total)

    def defines(self) -> dict[str, int]:
        """What the kernel is compiled with."""
        return {name.upper(): value for name, value in self._asdict().items() if name != "total"}


@dataclass(frozen=True)
class Plan:
    """How to launch one product.

    Attributes:
        spec: the kernel.
        block: its compile-time choices.
        grid: blocks.
        shared_bytes: dynamic shared memory of a block.
        text: what was chosen, one line.
    """

    spec: KernelSpec
    block: Block
    grid: Grid
    shared_bytes: int
    text: str


def fits(props: DeviceProps, shape: Shape) -> bool:
    """Whether a kernel can take the shape at all; alignment of the tensors is the caller's to check."""
    outputs, inner = (shape.k, shape.n) if shape.transposed else (shape.n, shape.k)
    weight_rows = max(shape.experts, 1) * shape.n
    return (
        props.arch == ARCH
        and shape.dtype != 0
        and min(shape.m, shape.n, shape.k) > 0
        and shape.k % STEP == 0
        and shape.k % shape.blocksize == 0
        and inner % 8 == 0
        and weight_rows * shape.k // shape.blocksize < 1 << 31
        and max(weight_rows, shape.m, outputs) < 1 << 31
        and shape.experts <= 4096
    )


def tiles_of(shape: Shape, b: Block) -> int:
    """Tiles of a product; of experts, whose rows only the device knows, as many as are to be expected."""
    outputs = shape.k if shape.transposed else shape.n
    return max(1, round(-(-outputs // OUTPUTS) * shape.groups(b.columns)))


def cost(props: DeviceProps, shape: Shape, b: Block) -> float:
    """Estimated microseconds."""
    steps = -(-shape.n // STEP) if shape.transposed else -(-shape.k // (2 * STEP)) * 2
    tiles = tiles_of(shape, b)
    blocks = min(props.sm_count // b.split * b.split, tiles * b.split)
    turns, rest = divmod(tiles, blocks)
    shared = b.split > 1 and 0 < rest * b.split <= blocks
    busy = turns * steps + (-(-steps // b.split) if shared else steps) * (rest > 0)
    pairs = b.bytewise and shape.dtype == BF16
    step = (_PAIRS_MICROSECONDS if pairs else _STEP_MICROSECONDS[b.transposed])[b.columns] * (
        _IN_CLUSTERS[b.transposed] if b.split > 1 else 1.0
    )
    exchange = _EXCHANGE_MICROSECONDS * b.columns if shared else 0.0
    fixed = _LAUNCH_MICROSECONDS[b.transposed] + (turns + (rest > 0)) * _TILE_MICROSECONDS[b.transposed]
    return fixed + busy * step + exchange + (_EXPERTS_MICROSECONDS if shape.experts else 0.0)


_LAUNCH_MICROSECONDS = {False: 0.46, True: 2.7}
_TILE_MICROSECONDS = {False: 3.1, True: 1.9}
_STEP_MICROSECONDS = {
    False: {256: 0.71, 192: 0.58, 128: 0.49, 64: 0.35, 32: 0.348},
    True: {256: 0.855, 192: 0.65, 128: 0.555, 64: 0.49, 32: 0.445},
}
"""Of a multiprocessor for one step of a tile, of a product and of a gradient, as measured on an H100; for few columns
decoding takes most of it."""
_PAIRS_MICROSECONDS = {192: 0.549, 128: 0.453, 64: 0.308, 32: 0.29}
"""The same where a byte's codes are looked up as two bfloat16."""
_IN_CLUSTERS = {False: 1.0, True: 1.14}
_EXPERTS_MICROSECONDS = 4.0
"""In which blocks find out whose rows are where."""
_EXCHANGE_MICROSECONDS = 0.015
"""For a row of x of a tile that a cluster shares."""


def candidates(props: DeviceProps, shape: Shape) -> Iterator[Block]:
    """Kinds of blocks that fit the shape and the device."""
    if fits(props, shape):
        inner = shape.n if shape.transposed else shape.k
        for b in (b for b in BLOCKS if suits(shape, b)):
            if Memory.of(shape, b).total <= props.shared_per_block and b.split <= -(-inner // (2 * STEP)):
                yield b


@lru_cache(maxsize=4096)
def plan_matmul(props: DeviceProps, shape: Shape) -> tuple[Plan, float] | None:
    """The plan for a shape and its estimated microseconds, or None where neither kernel can run."""
    best = min(candidates(props, shape), key=lambda b: cost(props, shape, b), default=None)
    return None if best is None else (make_plan(props, shape, best), cost(props, shape, best))


def make_plan(props: DeviceProps, shape: Shape, b: Block) -> Plan:
    """The plan for one kind of block, of the shape's direction."""
    memory = Memory.of(shape, b)
    decode, product = b.registers
    name = "matmul_transposed" if b.transposed else "matmul_forward"
    own = (
        {"DECODERS": b.decoders, "DECODER_REGISTERS": decode}
        if b.transposed
        else {"BYTEWISE": int(b.bytewise), "CHUNKS": b.chunks, "BUFFERS": b.buffers, "SUPPLY_REGISTERS": decode}
    )
    spec = KernelSpec.of(
        f"{name}.cu",
        name,
        {
            "DTYPE": shape.dtype,
            "BLOCKSIZE": shape.blocksize,
            "NESTED": int(shape.nested),
            "GROUPED": int(shape.experts > 0),
            "COLUMNS": b.columns,
            "SPLIT": b.split,
            "STAGES": b.stages,
            "WEIGHT_STAGES": b.weight_stages,
            "RESULT_COLUMNS": b.result_columns,
            "PRODUCT_REGISTERS": product,
            **own,
            **memory.defines(),
        },
        package="fourbit_cuda",
        arch_specific=True,
    )
    blocks = props.sm_count // b.split * b.split
    if not shape.experts:
        blocks = min(blocks, tiles_of(shape, b) * b.split)
    text = (
        f"fused decode and wgmma: {blocks} blocks on {props.sm_count} multiprocessors, tiles of {OUTPUTS} outputs x"
        f" {b.columns} rows of x{f', the last shared by clusters of {b.split}' if b.split > 1 else ''}"
    )
    return Plan(spec, b, (blocks, 1, 1), memory.total, text)


class Ready:
    """A plan with its kernel loaded; called with addresses, it launches.

    x, packed and out must be 16-byte aligned; `rest`: absmax, code, the three of nested scales, bias or 0 (for experts
    their offsets, int64 if `wide`, else int32), and out.
    """

    def __init__(self, kernel: Any, plan: Plan, shape: Shape, wide: bool = False) -> None:
        rows = max(shape.experts, 1) * shape.n
        inner = shape.n if shape.transposed else shape.k
        self._encode = kernel.encode_map
        self._of_x = (2, inner, shape.m, STEP, plan.block.columns)
        self._of_weight = (1, shape.k // 2, rows, STEP, OUTPUTS)
        sizes = (shape.m, shape.n, shape.k, shape.experts, int(wide))
        threads, memory = plan.block.threads, plan.shared_bytes
        self._launch = kernel.bind(plan.grid, threads, memory, 7, sizes, overlapping=not shape.experts, maps=2)

    def __call__(self, x: int, packed: int, *rest: int) -> None:
        encode = self._encode
        self._launch(tensor_map(encode, x, *self._of_x), tensor_map(encode, packed, *self._of_weight), *rest)
