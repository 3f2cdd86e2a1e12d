"""The kernels for many rows, compiled for the CPU with a stand-in for sm_90a's instructions: every kind of block."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fourbit
import fourbit_cuda
from fourbit_cuda import matmul
from fourbit_cuda.tile import Shape
from fourbit_gpu.device import DeviceProps
from fourbit_gpu.elementwise import DTYPE_CODES
from fourbit_gpu.spec import KernelSpec
from tests.pair_weights import pair_weights
from tests.support import skip_or_fail

EMULATOR = Path(__file__).parent / "emulator"
CUDA = Path(fourbit_cuda.__file__).parent
SOURCES = (
    *CUDA.glob("kernels/matmul_*.cu"),
    CUDA / "include" / "experts.h",
    *CUDA.glob("include/matmul_*.h"),
    *EMULATOR.iterdir(),
)

if shutil.which("g++") is None:
    skip_or_fail("g++ is not there")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """From defines to the library, compiled once."""
    folder = tmp_path_factory.mktemp("emulator")
    for source in SOURCES:
        if source.is_file():
            shutil.copy(source, folder)
    built: dict[KernelSpec, ctypes.CDLL] = {}

    def made(spec: KernelSpec) -> ctypes.CDLL:
        if spec not in built:
            library = folder / f"matmul{len(built)}.so"
            flags = ("-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w", "-ffp-contract=off")
            kernel = (f'-DSOURCE="{spec.source}"', f"-DKERNEL={spec.name}")
            subprocess.run(["g++", *flags, *kernel, *spec.options, "run.cpp", "-o", library], cwd=folder, check=True)
            built[spec] = ctypes.CDLL(str(library))
        return built[spec]

    return made


class EmulatedKernel:
    """A kernel that `matmul.Ready` can launch."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    @staticmethod
    def encode_map(at, datatype, rank, address, dims, strides, box, steps, interleave, swizzle, promotion, fill) -> int:
        """As cuTensorMapEncodeTiled, but what the emulator reads; checks what the driver would."""
        columns, rows = (ctypes.c_uint64 * 2).from_address(dims)
        (stride,) = (ctypes.c_uint64 * 1).from_address(strides)
        tile_columns, tile_rows = (ctypes.c_uint32 * 2).from_address(box)
        itemsize = {0: 1, 1: 2}[datatype]
        assert (rank, interleave, promotion, fill) == (2, 0, 2, 0)
        assert tuple((ctypes.c_uint32 * 2).from_address(steps)) == (1, 1)
        assert at % 64 == 0 and address % 16 == 0 and stride % 16 == 0 and stride == columns * itemsize
        assert 1 <= tile_columns <= 256 and 1 <= tile_rows <= 256
        assert swizzle == {64: 2, 128: 3}[tile_columns * itemsize]
        packed = struct.pack("6Q", address, itemsize, columns, rows, tile_columns, tile_rows)
        ctypes.memmove(at, packed.ljust(128, b"\0"), 128)
        return 0

    def bind(self, grid, threads, shared_bytes, count, last, overlapping, maps):
        """As CudaKernel.bind."""
        assert (grid[1:], count, maps) == ((1, 1), 7, 2)
        sizes = (ctypes.c_int64 * 5)(*last)

        def launch(*parameters) -> None:
            both = ctypes.create_string_buffer(b"".join(each[:48] for each in parameters[:2]), 96)
            addresses = (ctypes.c_void_p * 7)(*parameters[2:])
            self.library.run(both, addresses, sizes, grid[0], shared_bytes)

        return launch


def props(sms: int) -> DeviceProps:
    return DeviceProps(0, "emulated", 90, sms, 50 << 20, 227 << 10, 32, 3350.0)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same at a 16-byte aligned address."""
    spare = torch.empty(tensor.numel() + 32, dtype=tensor.dtype)
    skip = -spare.data_ptr() % 64 // tensor.element_size()
    return spare[skip : skip + tensor.numel()].view(tensor.shape).copy_(tensor)


def product(
    build,
    shape: Shape,
    kind: matmul.Block,
    sms: int,
    quant_type="nf4",
    bias=False,
    ends=None,
    wide=False,
    chooses=False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(y, y of float64)` of a random weight and a random x, or one that `chooses`: each row one element of the inner
    dimension."""
    generator = torch.Generator().manual_seed(shape.n + shape.k + shape.m)
    dtype = next(each for each, code in DTYPE_CODES.items() if code == shape.dtype)
    size = (*((shape.experts,) if shape.experts else ()), shape.n, shape.k)
    w = torch.randn(size, generator=generator)
    packed, state = fourbit.quantize_4bit(
        w, blocksize=shape.blocksize, double_quant=shape.nested, quant_type=quant_type
    )
    pairs = kind.bytewise and shape.dtype == matmul.BF16
    dense = pair_weights(packed, state) if pairs else fourbit.dequantize_4bit(packed, state, dtype)
    dense = dense.double().view(-1, shape.n, shape.k)
    outputs, inner = (shape.k, shape.n) if shape.transposed else (shape.n, shape.k)
    x = torch.randn(shape.m, inner, generator=generator)
    if chooses:
        x = torch.nn.functional.one_hot(torch.randint(inner, (shape.m,), generator=generator), inner)
    x = aligned(x.to(dtype))
    out = aligned(torch.full((shape.m, outputs), float("nan"), dtype=dtype))
    packed = aligned(packed.view(-1))
    added = aligned(torch.randn(outputs, generator=generator).to(dtype))
    offsets = aligned(torch.tensor(ends or [0], dtype=torch.int64 if wide else torch.int32))
    plan = matmul.make_plan(props(sms), shape, kind)
    ready = matmul.Ready(EmulatedKernel(build(plan.spec)), plan, shape, wide)
    nested = [state.nested_absmax, state.nested_code, state.nested_offset] if shape.nested else []
    scales = [each.data_ptr() for each in (state.absmax, state.code, *nested)] + [0] * (3 - len(nested))
    last = offsets.data_ptr() if shape.experts else added.data_ptr() if bias else 0
    ready(x.data_ptr(), packed.data_ptr(), *scales, last, out.data_ptr())
    if not shape.experts:
        expected = x.double() @ (dense[0] if shape.transposed else dense[0].T)
        return out, expected + added.double() if bias else expected
    expected = torch.zeros(shape.m, outputs, dtype=torch.float64)
    first = 0
    for expert, end in enumerate(ends):
        if end > first:
            expected[first:end] = x[first:end].double() @ (dense[expert] if shape.transposed else dense[expert].T)
        first = max(first, end)
    return out, expected


def check(y: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums of float32, rounded once."""
    assert not y.isnan().any()
    rounding = torch.finfo(y.dtype).eps / 2
    y = y.double()
    assert ((y - expected).abs() <= 1.01 * rounding * expected.abs() + 1e-5 * expected.abs().max()).all()


SHAPE = Shape(70, 200, 320, 1, 64, False)  # ragged in all directions; an odd number of steps
DIRECTIONS = ("product", "gradient")
directions = pytest.mark.parametrize("transposed", (False, True), ids=DIRECTIONS)


def small(shape: Shape) -> matmul.Block:
    return matmul.block(64, 1, shape.transposed)


BY_TABLES = matmul.block(128, 1, bytewise=False)
assert matmul.block(64, 1).bytewise
"""The smallest product whose operand comes by tables; `small` is one by bytes."""

SHORT = (matmul.block(32, 1), matmul.block(64, 2), BY_TABLES, matmul.block(32, 2, True), matmul.block(64, 1, True))
"""What runs without --long: threads by the hundred take their time on few cores."""
kinds = pytest.mark.parametrize(
    "kind",
    [pytest.param(b, marks=() if b in SHORT else pytest.mark.long) for b in matmul.BLOCKS],
    ids=lambda b: f"{b.columns}-{b.split}-{DIRECTIONS[b.transposed]}{'-bytes' * b.bytewise}",
)


@kinds
def test_every_kind_of_block(build, kind):
    """Two tiles of x, the second nearly empty, and more tiles than blocks, some of them shared."""
    shape = replace(SHAPE, k=576, n=520, transposed=kind.transposed, m=kind.columns + 9)
    check(*product(build, shape, kind, sms=8))


@directions
@pytest.mark.parametrize("dtype", (1, pytest.param(2, marks=pytest.mark.long)), ids=("bf16", "fp16"))
@pytest.mark.parametrize(
    "blocksize, nested",
    (
        (32, False),
        (64, True),
        pytest.param(32, True, marks=pytest.mark.long),
        pytest.param(128, False, marks=pytest.mark.long),
    ),
    ids=("32", "64-double", "32-double", "128"),
)
@pytest.mark.parametrize("fours", (True, False), ids=("fours", "odd"))
def test_weights(build, blocksize, nested, dtype, transposed, fours):
    """Those of dequantize, or of pairs of codes, bit for bit, with every form of scales; rows with a multiple of four
    scales, and without."""
    k = 1024 if fours else 1024 - max(blocksize, 64)
    shape = replace(SHAPE, k=k, n=136, dtype=dtype, blocksize=blocksize, nested=nested, transposed=transposed)
    quant_type = "fp4" if blocksize == 128 else "nf4"
    for kind in (small(shape),) if transposed else (small(shape), BY_TABLES):
        y, expected = product(build, shape, kind, sms=3, quant_type=quant_type, chooses=True)
        assert torch.equal(y.double(), expected)


@pytest.mark.parametrize("n", (1, 129, 200), ids=str)
@pytest.mark.parametrize("m", (1, 64, 65), ids=str)
def test_bias_and_odd_sizes(build, m, n):
    check(*product(build, replace(SHAPE, m=m, n=n), small(SHAPE), sms=2, bias=True))


@pytest.mark.parametrize("k", (64, 128, 192, 448), ids=str)
def test_few_steps(build, k):
    """Fewer than there are groups of decoders, several tiles a block."""
    shape, gradient = replace(SHAPE, k=k, n=384), replace(SHAPE, n=k, k=384, transposed=True)
    check(*product(build, shape, small(shape), sms=2))
    check(*product(build, shape, BY_TABLES, sms=2))
    check(*product(build, gradient, small(gradient), sms=2))


@directions
@pytest.mark.parametrize("wide", (False, pytest.param(True, marks=pytest.mark.long)), ids=("int32", "int64"))
@pytest.mark.parametrize(
    "ends",
    ([0, 70, 70, 100], [3, 2, 90, 90], [130, 130, 130, 130], [0, 0, 0, 0], [5, 10, 15, 300]),
    ids=("some empty", "falling", "one", "none", "past the end"),
)
def test_experts(build, ends, wide, transposed):
    """Rows of x past the last expert's give zeros; ends are what a router may give."""
    shape = replace(SHAPE, m=130, experts=4, transposed=transposed)
    check(
        *product(
            build,
            shape,
            small(shape),
            sms=5,
            ends=[min(end, 130) for end in ends] if max(ends) > 130 else ends,
            wide=wide,
        )
    )


@pytest.mark.long
@kinds
def test_many_experts(build, kind):
    """More than a warp of them; none, one, nearly a tile, a tile, and a row more."""
    columns, nested = kind.columns, kind.split == 1
    sizes = [0, 1, columns - 1, *([0] * 14), columns, columns + 1, *([0, 1] * 8)]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    shape = replace(SHAPE, m=ends[-1] + 3, n=136, k=192, nested=nested, experts=len(sizes), transposed=kind.transposed)
    check(*product(build, shape, kind, sms=8, ends=ends))
