"""Scalar ALU instructions: one value per wave, and the condition bit SCC."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.rocm.gcn import floats
from tests.rocm.gcn.compare import RELATIONS
from tests.rocm.gcn.disassembly import Instruction
from tests.rocm.gcn.errors import UnknownInstruction
from tests.rocm.gcn.operands import scalar_reader, scalar_writer
from tests.rocm.gcn.waves import Waves

Run = Callable[[Waves], None]
Values = tuple[np.ndarray, "np.ndarray | None"]
U32, U64, I64 = np.uint32, np.uint64, np.int64

OPS: dict[str, tuple[str, str, Callable[..., Values]]] = {}
"""Name to (result type, source types, function to (result, SCC or None)). A source type "scc" reads SCC."""
COMPARISONS: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {}


def define(names: str, result: str, sources: str, function: Callable[..., Values]) -> None:
    """Register `function` under each of the blank-separated `names`."""
    for name in names.split():
        OPS[name] = (result, sources, function)


def _non_zero(value: np.ndarray) -> Values:
    return value, value != 0


def _carry_add(a: np.ndarray, b: np.ndarray, carry: np.ndarray | int = 0) -> Values:
    total = a.astype(U64) + b.astype(U64) + np.asarray(carry, U64)
    return total.astype(U32), total >> U64(32) != 0


def _borrow_subtract(a: np.ndarray, b: np.ndarray, borrow: np.ndarray | int = 0) -> Values:
    total = a.astype(U64) - b.astype(U64) - np.asarray(borrow, U64)
    return total.astype(U32), (total >> U64(32)) & U64(1) != 0


def _signed(function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[..., Values]:
    def run(a: np.ndarray, b: np.ndarray) -> Values:
        exact = function(a.astype(I64), b.astype(I64))
        wrapped = exact.astype(np.int32)
        return wrapped, wrapped != exact

    return run


def _field(value: np.ndarray, control: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    offset = (control & U32(bits - 1)).astype(U64)
    width = ((control >> U32(16)) & U32(0x7F)).astype(U64)
    return value, offset, np.minimum(width, bits)


def _extract(bits: int) -> Callable[..., Values]:
    def run(value: np.ndarray, control: np.ndarray) -> Values:
        value, offset, width = _field(value, control, bits)
        mask = np.where(width >= 64, ~U64(0), (U64(1) << np.minimum(width, 63).astype(U64)) - U64(1))
        return _non_zero(((value.astype(U64) >> offset) & mask).astype(value.dtype))

    return run


def _extract_signed(bits: int) -> Callable[..., Values]:
    def run(value: np.ndarray, control: np.ndarray) -> Values:
        value, offset, width = _field(value, control, bits)
        shifted = value.astype(I64) >> offset.astype(I64)
        spare = 64 - np.maximum(width, 1).astype(I64)
        field = np.where(width == 0, 0, (shifted << spare) >> spare)
        return _non_zero(field.astype(value.dtype))

    return run


def _minmax(smaller: bool) -> Callable[..., Values]:
    def run(a: np.ndarray, b: np.ndarray) -> Values:
        first = a < b if smaller else a > b
        return np.where(first, a, b), first

    return run


def _leading_zeros(value: np.ndarray) -> Values:
    exponent = np.array([int(v).bit_length() for v in value.ravel()])
    return np.where(value == 0, U32(0xFFFFFFFF), (value.dtype.itemsize * 8 - exponent).astype(U32)), None


def _trailing_zeros(value: np.ndarray) -> Values:
    position = np.array([(int(v) & -int(v)).bit_length() - 1 for v in value.ravel()])
    return np.where(value == 0, U32(0xFFFFFFFF), position.astype(np.int64).astype(U32)), None


def _count(value: np.ndarray) -> Values:
    return _non_zero(np.bitwise_count(value).astype(U32))


def _reverse_bits(value: np.ndarray) -> Values:
    """The bits of 32- or 64-bit values from last to first."""
    bits = value.dtype.itemsize * 8
    return np.array([int(f"{int(v):0{bits}b}"[::-1], 2) for v in value.ravel()], value.dtype), None


for bits, kind, signed in ((32, "b32", "i32"), (64, "b64", "i64")):
    u = f"u{bits}"
    two, dtype = f"{u} {u}", U32 if bits == 32 else U64
    full = dtype(bits - 1)
    define(f"s_mov_{kind}", u, u, lambda a: (a, None))
    define(f"s_not_{kind}", u, u, lambda a: _non_zero(~a))
    define(f"s_wqm_{kind}", u, u, lambda a: _non_zero(a))
    define(f"s_and_{kind}", u, two, lambda a, b: _non_zero(a & b))
    define(f"s_or_{kind}", u, two, lambda a, b: _non_zero(a | b))
    define(f"s_xor_{kind}", u, two, lambda a, b: _non_zero(a ^ b))
    define(f"s_andn2_{kind} s_and_not1_{kind}", u, two, lambda a, b: _non_zero(a & ~b))
    define(f"s_orn2_{kind} s_or_not1_{kind}", u, two, lambda a, b: _non_zero(a | ~b))
    define(f"s_nand_{kind}", u, two, lambda a, b: _non_zero(~(a & b)))
    define(f"s_nor_{kind}", u, two, lambda a, b: _non_zero(~(a | b)))
    define(f"s_xnor_{kind}", u, two, lambda a, b: _non_zero(~(a ^ b)))
    define(f"s_cselect_{kind}", u, f"{two} scc", lambda a, b, scc: (np.where(scc, a, b), None))
    define(f"s_lshl_{kind}", u, f"{u} u32", lambda a, b, f=full: _non_zero(a << (b.astype(a.dtype) & f)))
    define(f"s_lshr_{kind}", u, f"{u} u32", lambda a, b, f=full: _non_zero(a >> (b.astype(a.dtype) & f)))
    define(
        f"s_ashr_{signed}", signed, f"{signed} u32", lambda a, b, f=bits - 1: _non_zero(a >> (b.astype(a.dtype) & f))
    )
    define(f"s_bfe_u{bits}", u, f"{u} u32", _extract(bits))
    define(f"s_bfe_{signed}", signed, f"{signed} u32", _extract_signed(bits))
    one = dtype(1)
    define(
        f"s_bfm_{kind}",
        u,
        "u32 u32",
        lambda w, o, d=dtype, f=full, i=one: (((i << (w.astype(d) & f)) - i) << (o.astype(d) & f), None),
    )
    define(f"s_bitset1_{kind}", u, f"u32 d{u}", lambda a, d, t=dtype, f=full, i=one: (d | i << (a.astype(t) & f), None))
    define(
        f"s_bitset0_{kind}", u, f"u32 d{u}", lambda a, d, t=dtype, f=full, i=one: (d & ~(i << (a.astype(t) & f)), None)
    )
    define(f"s_bcnt1_i32_{kind}", "u32", u, _count)
    define(f"s_brev_{kind}", u, u, _reverse_bits)
    define(f"s_ff1_i32_{kind} s_ctz_i32_{kind}", "u32", u, _trailing_zeros)
    define(f"s_flbit_i32_{kind} s_clz_i32_u{bits}", "u32", u, _leading_zeros)
define("s_movk_i32", "i32", "k", lambda a: (a, None))
define("s_addk_i32 s_addk_co_i32", "i32", "k di32", lambda k, d: _signed(np.add)(d, k))
define("s_mulk_i32", "i32", "k di32", lambda k, d: (d * k, None))
define("s_cmovk_i32", "i32", "k di32 scc", lambda k, d, scc: (np.where(scc, k, d), None))
define("s_cmov_b32", "u32", "u32 du32 scc", lambda a, d, scc: (np.where(scc, a, d), None))
define("s_cmov_b64", "u64", "u64 du64 scc", lambda a, d, scc: (np.where(scc, a, d), None))
define("s_add_u32 s_add_co_u32", "u32", "u32 u32", _carry_add)
define("s_addc_u32 s_add_co_ci_u32", "u32", "u32 u32 scc", _carry_add)
define("s_sub_u32 s_sub_co_u32", "u32", "u32 u32", _borrow_subtract)
define("s_subb_u32 s_sub_co_ci_u32", "u32", "u32 u32 scc", _borrow_subtract)
define("s_add_i32 s_add_co_i32", "i32", "i32 i32", _signed(np.add))
define("s_sub_i32 s_sub_co_i32", "i32", "i32 i32", _signed(np.subtract))
define("s_add_u64 s_add_nc_u64", "u64", "u64 u64", lambda a, b: (a + b, None))
define("s_sub_u64 s_sub_nc_u64", "u64", "u64 u64", lambda a, b: (a - b, None))
define("s_mul_u64", "u64", "u64 u64", lambda a, b: (a * b, None))
define("s_mul_i32", "u32", "u32 u32", lambda a, b: (a * b, None))
define("s_mul_hi_u32", "u32", "u32 u32", lambda a, b: ((a.astype(U64) * b.astype(U64) >> U64(32)).astype(U32), None))
define(
    "s_mul_hi_i32", "i32", "i32 i32", lambda a, b: ((a.astype(I64) * b.astype(I64) >> I64(32)).astype(np.int32), None)
)
define("s_min_u32", "u32", "u32 u32", _minmax(True))
define("s_max_u32", "u32", "u32 u32", _minmax(False))
define("s_min_i32", "i32", "i32 i32", _minmax(True))
define("s_max_i32", "i32", "i32 i32", _minmax(False))
define("s_abs_i32", "i32", "i32", lambda a: _non_zero(np.abs(a)))
define("s_sext_i32_i8", "i32", "u32", lambda a: (a.astype(np.int8).astype(np.int32), None))
define("s_sext_i32_i16", "i32", "u32", lambda a: (a.astype(np.int16).astype(np.int32), None))
define("s_pack_ll_b32_b16", "u32", "u32 u32", lambda a, b: (a & U32(0xFFFF) | b << U32(16), None))
define("s_pack_lh_b32_b16", "u32", "u32 u32", lambda a, b: (a & U32(0xFFFF) | b & U32(0xFFFF0000), None))
define("s_pack_hh_b32_b16", "u32", "u32 u32", lambda a, b: (a >> U32(16) | b & U32(0xFFFF0000), None))
# scalar floats: gfx11.5 and newer
define("s_add_f32", "f32", "f32 f32", lambda a, b: (a + b, None))
define("s_sub_f32", "f32", "f32 f32", lambda a, b: (a - b, None))
define("s_mul_f32", "f32", "f32 f32", lambda a, b: (a * b, None))
define("s_fmac_f32", "f32", "f32 f32 df32", lambda a, b, d: (floats.fma(a, b, d), None))
define("s_fmaak_f32 s_fmamk_f32", "f32", "f32 f32 f32", lambda a, b, c: (floats.fma(a, b, c), None))
define("s_max_num_f32", "f32", "f32 f32", lambda a, b: (floats.maximum(a, b), None))
define("s_min_num_f32", "f32", "f32 f32", lambda a, b: (floats.minimum(a, b), None))
define("s_cvt_f32_i32", "f32", "i32", lambda a: (a.astype(np.float32), None))
define("s_cvt_f32_u32", "f32", "u32", lambda a: (a.astype(np.float32), None))
define("s_cvt_f32_f16", "f32", "f16", lambda a: (a.astype(np.float32), None))
for amount in (1, 2, 3, 4):

    def _shift_add(a: np.ndarray, b: np.ndarray, amount: int = amount) -> Values:
        total = (a.astype(U64) << U64(amount)) + b.astype(U64)
        return total.astype(U32), total >> U64(32) != 0

    define(f"s_lshl{amount}_add_u32", "u32", "u32 u32", _shift_add)
for relation, function in {
    "eq": lambda a, b: a == b,
    "lg": lambda a, b: a != b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
}.items():
    for kind in ("u32", "i32", "u64"):
        COMPARISONS[f"s_cmp_{relation}_{kind}"] = (kind, function)
    COMPARISONS[f"s_cmpk_{relation}_u32"] = ("u32", function)
    COMPARISONS[f"s_cmpk_{relation}_i32"] = ("i32", function)
for relation, function in RELATIONS.items():
    for kind in ("f32", "f16"):
        COMPARISONS[f"s_cmp_{relation}_{kind}"] = (kind, function)
COMPARISONS["s_bitcmp1_b32"] = ("u32", lambda a, b: (a >> (b & U32(31))) & U32(1) != 0)
COMPARISONS["s_bitcmp0_b32"] = ("u32", lambda a, b: (a >> (b & U32(31))) & U32(1) == 0)

SAVE_EXEC: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "and": lambda source, old: source & old,
    "or": lambda source, old: source | old,
    "xor": lambda source, old: source ^ old,
    "andn2": lambda source, old: source & ~old,
    "and_not1": lambda source, old: source & ~old,
    "orn2": lambda source, old: source | ~old,
    "or_not1": lambda source, old: source | ~old,
    "andn1": lambda source, old: ~source & old,
    "and_not0": lambda source, old: ~source & old,
}


def build(instruction: Instruction, target: str) -> Run:
    """A scalar ALU instruction as a function of the waves."""
    name = instruction.mnemonic.removesuffix("_e32")
    if instruction.modifiers:
        raise UnknownInstruction(instruction.text)
    if "_saveexec_" in name:
        return _save_exec(instruction, name)
    if name in COMPARISONS:
        kind, relation = COMPARISONS[name]
        a, b = (scalar_reader(text, kind) for text in instruction.operands)
        return lambda waves: waves.set_scc(relation(a(waves), b(waves)))
    if name not in OPS:
        raise UnknownInstruction(instruction.text)
    result, sources, function = OPS[name]
    write = scalar_writer(instruction.operands[0], result)
    texts = list(instruction.operands[1:])
    readers = []
    for kind in sources.split():
        if kind == "scc":
            readers.append(lambda waves: waves.scc)
        elif kind == "k":
            value = int(texts.pop(0), 0) & 0xFFFF
            immediate = np.array([value - (value >> 15 << 16)], np.int32)
            readers.append(lambda waves, immediate=immediate: immediate)
        elif kind.startswith("d"):
            readers.append(scalar_reader(instruction.operands[0], kind[1:]))
        else:
            readers.append(scalar_reader(texts.pop(0), kind))
    if texts:
        raise UnknownInstruction(instruction.text)

    def run(waves: Waves) -> None:
        value, condition = function(*(read(waves) for read in readers))
        write(waves, value)
        if condition is not None:
            waves.set_scc(condition)

    return run


def _save_exec(instruction: Instruction, name: str) -> Run:
    operation, _, kind = name.removeprefix("s_").partition("_saveexec_")
    unsigned = {"b32": "u32", "b64": "u64"}[kind]
    exec_name = "exec_lo" if kind == "b32" else "exec"
    combine = SAVE_EXEC[operation]
    save, source = scalar_writer(instruction.operands[0], unsigned), scalar_reader(instruction.operands[1], unsigned)
    read_exec, write_exec = scalar_reader(exec_name, unsigned), scalar_writer(exec_name, unsigned)

    def run(waves: Waves) -> None:
        old = read_exec(waves)
        new = np.broadcast_to(combine(source(waves), old), old.shape)
        save(waves, old)
        write_exec(waves, new)
        waves.set_scc(new != 0)

    return run
