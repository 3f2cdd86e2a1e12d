"""The emulator itself: that it computes what the instructions say, and notices what it promises to notice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fourbit_gpu.program import header
from fourbit_gpu.spec import KernelSpec
from fourbit_rocm.targets import target
from tests.rocm.gcn import errors, floats, tiers
from tests.rocm.gcn.disassembly import decode, objdump, parse
from tests.rocm.gcn.launch import load
from tests.rocm.gcn.machine import Program
from tests.rocm.gcn.memory import Memory
from tests.rocm.gcn.waves import Waves
from tests.support import skip_or_fail

SAMPLES = (Path(__file__).parent / "samples" / "barriers.hip").read_text()
INPUT = np.arange(1, 257, dtype=np.uint32)


@pytest.fixture(scope="module", params=tiers.ARCHS)
def kernels(request):
    if objdump() is None:
        skip_or_fail("llvm-objdump is missing: run .ci/amdgpu")
    compilers = tiers.available()
    if not compilers:
        skip_or_fail("no compiler for the samples: run .ci/amdgpu")
    spec = KernelSpec.of("barriers.hip", "exchange")
    options = tiers.compiler.options_for(spec, target(request.param))
    return load(compilers[-1].compile(spec, SAMPLES, {"shim.h": header("shim.h")}, options))


def run(kernels, name, data=INPUT, grid=(1, 1, 1), results=256, **options):
    out = np.zeros(results, np.float32 if data.dtype == np.float32 and name == "divides" else np.uint32)
    memory = Memory()
    for array in (data, out):
        memory.register(array.ctypes.data, array.nbytes)
    arguments = np.array([data.ctypes.data, out.ctypes.data], np.uint64).tobytes()
    kernels[name].launch(memory, grid, (256, 1, 1), arguments, **options)
    return out


@pytest.mark.parametrize("schedule", (None, 0, 1, 2))
def test_exchange(kernels, schedule):
    assert (run(kernels, "exchange", schedule=schedule) == np.roll(INPUT, 128)).all()


@pytest.mark.parametrize("schedule", (None, 0, 1))
@pytest.mark.parametrize(
    ("name", "error"),
    (
        ("exchange_without_barrier", (errors.RaceError, errors.UninitializedRead)),
        ("barrier_for_some", errors.BarrierError),
        ("reads_unwritten_lds", errors.UninitializedRead),
        ("writes_past_the_end", errors.MemoryFault),
        ("all_write_their_own", errors.RaceError),
        ("traps", errors.KernelTrap),
    ),
)
def test_what_is_wrong_is_noticed(kernels, name, error, schedule):
    with pytest.raises(error):
        run(kernels, name, schedule=schedule)


def test_an_unwritten_register_gives_another_result_each_time(kernels):
    first, second = (run(kernels, "reads_unwritten_register", seed=seed) for seed in (1, 2))
    assert (first != second).mean() > 0.9


def test_one_value_from_all_is_no_race(kernels):
    assert (run(kernels, "all_write_one_value") == INPUT + 5).all()


def test_divergence(kernels):
    """Loops of different length in every lane (the steps to 1 of 3n + 1)."""
    expected = []
    for value in INPUT.tolist():
        steps = 0
        while value != 1:
            value, steps = (3 * value + 1 if value % 2 else value // 2), steps + 1
        expected.append(steps)
    assert run(kernels, "diverges").tolist() == expected


def test_division_is_exact(kernels):
    """Numerators and denominators of every magnitude, and pairs that have made a sequence fail."""
    random = np.random.default_rng(0)
    data = random.integers(0, 2**32, 512, dtype=np.uint32).view(np.float32)
    data[:128] = np.ldexp(random.standard_normal(128), random.integers(-149, 128, 128))
    data[128:160:2] = 1
    data[128:144] = np.array([1, 32767.998, 1, 1.9999999, 1, 1e38, 5e-324, 3, 1e-45, 1e38, 3e38, 1e-45, 0, 0, 1, 0])
    with np.errstate(all="ignore"):
        expected = data[0::2] / data[1::2]
    result = run(kernels, "divides", data)
    same = (result.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(result) & np.isnan(expected))
    assert same.all(), [(data[2 * i], data[2 * i + 1], result[i], expected[i]) for i in np.flatnonzero(~same)]


def test_a_product_keeps_its_sign_and_its_two_roundings_on_the_way_to_float16(kernels):
    data = np.random.default_rng(1).standard_normal(512).astype(np.float32)
    data[0:8] = [-0.0, 1.0, 0.0, -2.0, -1e-30, 1e-30, 65519.996, 1.0]
    expected = (data[0::2] * data[1::2]).astype(np.float16).view(np.uint16)
    assert (run(kernels, "to_half", data) == expected).all()


def test_votes(kernels):
    assert (run(kernels, "counts") == (INPUT % 3 == 0).sum()).all()


def test_geometry(kernels):
    assert (run(kernels, "geometry", grid=(3, 4, 1), results=12) == 3000 + 256 + 1).all()


def test_more_work_items_than_compiled_for(kernels):
    with pytest.raises(errors.EmulatorError, match="compiled for at most 256"):
        kernels["exchange"].launch(Memory(), (1, 1, 1), (512, 1, 1), bytes(16))


def test_arguments_of_the_wrong_size(kernels):
    with pytest.raises(errors.EmulatorError, match="24 bytes of arguments, the code object has 16"):
        kernels["exchange"].launch(Memory(), (1, 1, 1), (256, 1, 1), bytes(24))


@pytest.mark.parametrize(
    "text",
    (
        "v_frobnicate_b32 v0, v1",
        "v_add_f32_e32 v0, s_strange, v1",
        "v_add_f32_e64 v0, v1, v2 mul:2",
        "global_load_dword v0, v[1:2], off lds",
        "s_setreg_b32 hwreg(HW_REG_MODE), s0",
        "buffer_load_dword v0, off, s[0:3], 0",
        "v_pk_fma_f16 v0, v1, v2, v3 clamp",
        "v_pk_mov_b32 v[0:1], v[2:3], v[4:5] neg_lo:[1,0]",
        "v_pk_add_u16 v0, v1, v2 neg_lo:[1,0]",
        "v_pk_mul_f32 v[0:1], v[2:3], 2.0",
        "ds_add_rtn_u32 v0, v1, v2",
    ),
)
def test_what_is_unknown_is_refused(text):
    instruction = decode(text, 0x100, 8)
    program = Program([instruction, decode("s_endpgm", 0x108, 4)], "gfx90a", 64)
    with pytest.raises(errors.UnknownInstruction):
        program._decode(program.blocks[0x100])


# Registers of `step`, float32 in pairs and float16 in halves: the upper half of v1 is 4, its lower one 3, and so on.
PAIRS = {"v2": 1.5, "v3": -2.5, "v4": 4.25, "v5": 8.0, "v6": 0.5, "v7": -0.125, "s4": 16.0, "s5": 32.0}
HALVES = {"v0": (9.0, 7.0), "v1": (3.0, 4.0), "v2": (0.5, -8.0), "v3": (32.0, 64.0)}  # (low, high)


def step(text, target="gfx90a"):
    """The registers v0 and v1 of all lanes after one instruction, as float32 and, where HALVES are set, as float16."""
    waves = Waves(1, 64, 8, 0, np.zeros(1, int), np.zeros(1, int), seed=5)
    halved = any(kind in text for kind in ("16", "fma_mix"))
    for name, value in (HALVES if halved else PAIRS).items():
        file = waves.v if name[0] == "v" else waves.s
        file[int(name[1:])] = np.array(value, np.float16 if halved else np.float32).view(np.uint32)
    Program([decode("s_endpgm", 0, 4)], target, 64)._step(decode(text, 0x100, 8))(waves)
    assert (waves.v[:2] == waves.v[:2, :, :1]).all(), "lanes differ"
    first = np.ascontiguousarray(waves.v[:2, 0, 0])
    return first.view(np.float16)[:2].tolist() if halved else first.view(np.float32).tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    (
        # each result of its own source, by that source's bit of op_sel; op_sel_hi is not looked at
        ("v_pk_mov_b32 v[0:1], v[2:3], v[4:5]", [1.5, 4.25]),
        ("v_pk_mov_b32 v[0:1], v[2:3], v[4:5] op_sel:[1,0]", [-2.5, 4.25]),
        ("v_pk_mov_b32 v[0:1], v[2:3], v[4:5] op_sel:[0,1]", [1.5, 8.0]),
        ("v_pk_mov_b32 v[0:1], v[2:3], v[4:5] op_sel:[1,1]", [-2.5, 8.0]),
        ("v_pk_mov_b32 v[0:1], v[2:3], v[4:5] op_sel:[1,0] op_sel_hi:[0,1]", [-2.5, 4.25]),
        ("v_pk_mov_b32 v[0:1], s[4:5], 2.0 op_sel:[1,0]", [32.0, 2.0]),
        # the low result by op_sel and neg_lo, the high one by op_sel_hi and neg_hi
        ("v_pk_mul_f32 v[0:1], v[2:3], v[4:5]", [6.375, -20.0]),
        ("v_pk_mul_f32 v[0:1], v[2:3], v[4:5] op_sel:[1,0]", [-10.625, -20.0]),
        ("v_pk_mul_f32 v[0:1], v[2:3], v[4:5] op_sel_hi:[0,1]", [6.375, 12.0]),
        ("v_pk_mul_f32 v[0:1], v[2:3], 2.0 op_sel_hi:[1,0]", [3.0, -5.0]),
        ("v_pk_add_f32 v[0:1], v[2:3], v[4:5] op_sel:[1,0] op_sel_hi:[0,1] neg_lo:[0,1] neg_hi:[1,0]", [-6.75, 6.5]),
        ("v_pk_add_f32 v[0:1], v[2:3], s[4:5] op_sel_hi:[1,0]", [17.5, 13.5]),
        ("v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7] op_sel:[0,0,1] op_sel_hi:[1,1,0] neg_hi:[0,1,0]", [6.25, 20.5]),
        ("v_pk_add_f16 v0, v1, v2", [3.5, -4.0]),
        ("v_pk_add_f16 v0, v1, v2 op_sel:[1,0] op_sel_hi:[0,1] neg_lo:[1,0] neg_hi:[0,1]", [-3.5, 11.0]),
        ("v_pk_mul_f16 v0, v1, v2 op_sel:[0,1]", [-24.0, -32.0]),
        ("v_pk_mul_f16 v0, v1, 2.0 op_sel_hi:[1,0]", [6.0, 8.0]),
        ("v_pk_add_f16 v0, v1, 1.0", [4.0, 4.0]),  # the upper half of a constant is 0
        ("v_pk_fma_f16 v0, v1, v2, v3 op_sel:[0,0,1] op_sel_hi:[1,1,0] neg_lo:[0,0,1]", [-62.5, 0.0]),
        ("v_fma_mixlo_f16 v0, v1, v2, v3 op_sel:[1,0,1] op_sel_hi:[1,1,1]", [66.0, 7.0]),
        ("v_fma_mixhi_f16 v0, v1, v2, v3 op_sel:[0,1,0] op_sel_hi:[1,1,1]", [9.0, 8.0]),
    ),
)
def test_parts_of_packed_operands(text, expected):
    assert step(text) == expected


def test_a_shuffle_of_pairs(kernels):
    """What clang writes as v_pk_mov_b32 with unequal op_sel where there is that instruction."""
    data = np.arange(1024, dtype=np.float32) + 1
    pairs = data.reshape(256, 2, 2)
    shuffled = np.stack([pairs[:, 0, 1], pairs[:, 1, 0]], axis=1) * pairs[:, 1]
    assert (run(kernels, "shuffles", data.view(np.uint32), results=512) == shuffled.reshape(-1).view(np.uint32)).all()


def test_a_line_that_is_not_understood():
    with pytest.raises(ValueError, match="not understood"):
        parse("0000000000001600 <k>:\n\t<unknown instruction>\n")


def test_buffers_may_not_overlap():
    memory, data = Memory(), np.zeros(64, np.uint8)
    memory.register(data.ctypes.data, 32)
    with pytest.raises(ValueError, match="overlaps"):
        memory.register(data.ctypes.data + 31, 8)


def test_fma_rounds_once():
    """Against exact rational arithmetic."""
    from fractions import Fraction

    random = np.random.default_rng(3)
    a, b, c = (random.standard_normal(3000).astype(np.float32) for _ in range(3))
    c[:1000] = -(a * b)[:1000]  # cancellation: only the product's low half is left
    c[1000:2000] *= np.float32(2.0**-30)
    result = floats.fma(a, b, c)
    for x, y, z, got in zip(a, b, c, result, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        below, above = np.nextafter(got, np.float32(-np.inf)), np.nextafter(got, np.float32(np.inf))
        error = abs(Fraction(float(got)) - exact)
        assert error <= abs(Fraction(float(below)) - exact) and error <= abs(Fraction(float(above)) - exact)
