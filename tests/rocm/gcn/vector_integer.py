"""Integer vector instructions: name to (result type, source types, function)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

U32, U64, I64 = np.uint32, np.uint64, np.int64
Function = Callable[..., np.ndarray]
INTEGER_OPS: dict[str, tuple[str, str, Function]] = {}


def define(names: str, result: str, sources: str, function: Function) -> None:
    """Register `function` under each of the blank-separated `names` (an operation is renamed between targets)."""
    for name in names.split():
        INTEGER_OPS[name] = (result, sources, function)


def _shift_left(count: np.ndarray, value: np.ndarray) -> np.ndarray:
    return value << (count & count.dtype.type(value.dtype.itemsize * 8 - 1))


def _shift_right(count: np.ndarray, value: np.ndarray) -> np.ndarray:
    return value >> (count & count.dtype.type(value.dtype.itemsize * 8 - 1)).astype(value.dtype)


def _shift_left_64(count: np.ndarray, value: np.ndarray) -> np.ndarray:
    return value << (count & U32(63)).astype(U64)


def _shift_right_64(count: np.ndarray, value: np.ndarray) -> np.ndarray:
    return value >> (count & U32(63)).astype(value.dtype)


def _median(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))


def _extract(value: np.ndarray, offset: np.ndarray, width: np.ndarray) -> np.ndarray:
    width = width & U32(31)
    return (value >> (offset & U32(31))) & ((U32(1) << width) - U32(1))


def _extract_signed(value: np.ndarray, offset: np.ndarray, width: np.ndarray) -> np.ndarray:
    width, offset = width & U32(31), offset & U32(31)
    field = (value >> offset.astype(np.int32)).astype(I64)
    shift = (64 - width).astype(I64)
    return np.where(width == 0, 0, (field << (shift & 63)) >> (shift & 63)).astype(np.int32)


def _permute_bytes(high: np.ndarray, low: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """v_perm_b32: bytes 0-3 are of the second source, 4-7 of the first; 8-11 signs, 12 zero, above 0xff."""
    both = high.astype(U64) << U64(32) | low.astype(U64)
    result = np.zeros(np.broadcast_shapes(both.shape, selector.shape), U32)
    for byte in range(4):
        index = (selector >> U32(8 * byte)) & U32(0xFF)
        chosen = (both >> (np.minimum(index, 7) * U32(8)).astype(U64)) & U64(0xFF)
        sign_at = np.clip(index.astype(np.int64) - 8, 0, 3) * 16 + 15
        sign = ((both >> sign_at.astype(U64)) & U64(1)) * U64(0xFF)
        chosen = np.where(index < 8, chosen, np.where(index < 12, sign, np.where(index == 12, U64(0), U64(0xFF))))
        result |= chosen.astype(U32) << U32(8 * byte)
    return result


def _align(high: np.ndarray, low: np.ndarray, shift: np.ndarray) -> np.ndarray:
    both = high.astype(U64) << U64(32) | low.astype(U64)
    return (both >> shift.astype(U64)).astype(U32)


def _leading_zeros(value: np.ndarray) -> np.ndarray:
    exponent = np.frexp(value.astype(np.float64))[1]
    return np.where(value == 0, U32(0xFFFFFFFF), (32 - exponent).astype(U32))


def _trailing_zeros(value: np.ndarray) -> np.ndarray:
    lowest = value & (~value + U32(1))
    return np.where(value == 0, U32(0xFFFFFFFF), (np.frexp(lowest.astype(np.float64))[1] - 1).astype(U32))


def _reverse_bits(value: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(np.ascontiguousarray(value).view(np.uint8).reshape(*value.shape, 4), axis=-1)
    little = np.unpackbits(
        np.ascontiguousarray(value).view(np.uint8).reshape(*value.shape, 4), axis=-1, bitorder="little"
    )
    assert bits.shape == little.shape
    return np.packbits(little[..., ::-1], axis=-1, bitorder="little").view(U32).reshape(value.shape)


def _count_bits(value: np.ndarray, addend: np.ndarray) -> np.ndarray:
    return np.bitwise_count(value).astype(U32) + addend


def _low24(value: np.ndarray) -> np.ndarray:
    return value & U32(0xFFFFFF)


def _signed24(value: np.ndarray) -> np.ndarray:
    return (value << np.int32(8)) >> np.int32(8)


def _wide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(U64) * b.astype(U64)


def _half(value: np.ndarray, high: bool) -> np.ndarray:
    return value >> U32(16) if high else value & U32(0xFFFF)


UU, UUU = "u32 u32", "u32 u32 u32"
define("v_mov_b32", "u32", "u32", lambda a: a)
define("v_mov_b64", "u64", "u64", lambda a: a)
define("v_mov_b16", "u16", "u16", lambda a: a)
define("v_accvgpr_read_b32 v_accvgpr_mov_b32 v_accvgpr_write_b32", "u32", "u32", lambda a: a)
define("v_not_b32", "u32", "u32", lambda a: ~a)
define("v_not_b16", "u16", "u16", lambda a: ~a)
define("v_and_b32", "u32", UU, lambda a, b: a & b)
define("v_or_b32", "u32", UU, lambda a, b: a | b)
define("v_xor_b32", "u32", UU, lambda a, b: a ^ b)
define("v_xnor_b32", "u32", UU, lambda a, b: ~(a ^ b))
define("v_and_b16", "u16", "u16 u16", lambda a, b: a & b)
define("v_or_b16", "u16", "u16 u16", lambda a, b: a | b)
define("v_xor_b16", "u16", "u16 u16", lambda a, b: a ^ b)
define("v_lshlrev_b32", "u32", UU, _shift_left)
define("v_lshrrev_b32", "u32", UU, _shift_right)
define("v_ashrrev_i32", "i32", "u32 i32", _shift_right)
define("v_lshlrev_b16", "u16", "u16 u16", _shift_left)
define("v_lshrrev_b16", "u16", "u16 u16", _shift_right)
define("v_ashrrev_i16", "i16", "u16 i16", _shift_right)
define("v_lshlrev_b64", "u64", "u32 u64", _shift_left_64)
define("v_lshrrev_b64", "u64", "u32 u64", _shift_right_64)
define("v_ashrrev_i64", "i64", "u32 i64", _shift_right_64)
define("v_add_u32 v_add_nc_u32 v_add_i32 v_add_nc_i32", "u32", UU, lambda a, b: a + b)
define("v_sub_u32 v_sub_nc_u32 v_sub_i32 v_sub_nc_i32", "u32", UU, lambda a, b: a - b)
define("v_subrev_u32 v_subrev_nc_u32", "u32", UU, lambda a, b: b - a)
define("v_add_u16 v_add_nc_u16", "u16", "u16 u16", lambda a, b: a + b)
define("v_sub_u16 v_sub_nc_u16", "u16", "u16 u16", lambda a, b: a - b)
define("v_subrev_u16", "u16", "u16 u16", lambda a, b: b - a)
define("v_mul_lo_u16", "u16", "u16 u16", lambda a, b: a * b)
define("v_mad_u16 v_mad_legacy_u16", "u16", "u16 u16 u16", lambda a, b, c: a * b + c)
define("v_mul_lo_u32", "u32", UU, lambda a, b: a * b)
define("v_mul_hi_u32", "u32", UU, lambda a, b: (_wide(a, b) >> U64(32)).astype(U32))
define("v_mul_hi_i32", "u32", "i32 i32", lambda a, b: ((a.astype(I64) * b.astype(I64)) >> 32).astype(U32))
define("v_mul_u32_u24", "u32", UU, lambda a, b: _low24(a) * _low24(b))
define("v_mul_hi_u32_u24", "u32", UU, lambda a, b: (_wide(_low24(a), _low24(b)) >> U64(32)).astype(U32))
define("v_mul_i32_i24", "i32", "i32 i32", lambda a, b: _signed24(a) * _signed24(b))
define("v_mad_u32_u24", "u32", UUU, lambda a, b, c: _low24(a) * _low24(b) + c)
define("v_mad_i32_i24", "i32", "i32 i32 i32", lambda a, b, c: _signed24(a) * _signed24(b) + c)
define("v_mad_u32_u16", "u32", "u16 u16 u32", lambda a, b, c: a.astype(U32) * b.astype(U32) + c)
for suffix in ("u32", "i32", "u16", "i16"):
    two, three = f"{suffix} {suffix}", f"{suffix} {suffix} {suffix}"
    define(f"v_min_{suffix}", suffix, two, np.minimum)
    define(f"v_max_{suffix}", suffix, two, np.maximum)
    define(f"v_min3_{suffix}", suffix, three, lambda a, b, c: np.minimum(np.minimum(a, b), c))
    define(f"v_max3_{suffix}", suffix, three, lambda a, b, c: np.maximum(np.maximum(a, b), c))
    define(f"v_maxmin_{suffix}", suffix, three, lambda a, b, c: np.minimum(np.maximum(a, b), c))
    define(f"v_minmax_{suffix}", suffix, three, lambda a, b, c: np.maximum(np.minimum(a, b), c))
    define(f"v_med3_{suffix}", suffix, three, _median)
define("v_bfe_u32", "u32", UUU, _extract)
define("v_bfe_i32", "i32", "i32 u32 u32", _extract_signed)
define("v_bfi_b32", "u32", UUU, lambda mask, a, b: (mask & a) | (~mask & b))
define("v_bfm_b32", "u32", UU, lambda w, o: ((U32(1) << (w & U32(31))) - U32(1)) << (o & U32(31)))
define("v_perm_b32", "u32", UUU, _permute_bytes)
define("v_alignbit_b32", "u32", UUU, lambda a, b, s: _align(a, b, s & U32(31)))
define("v_alignbyte_b32", "u32", UUU, lambda a, b, s: _align(a, b, (s & U32(3)) * U32(8)))
define("v_lshl_add_u32", "u32", UUU, lambda a, s, c: (a << (s & U32(31))) + c)
define("v_add_lshl_u32", "u32", UUU, lambda a, b, s: (a + b) << (s & U32(31)))
define("v_lshl_or_b32", "u32", UUU, lambda a, s, c: (a << (s & U32(31))) | c)
define("v_and_or_b32", "u32", UUU, lambda a, b, c: (a & b) | c)
define("v_or3_b32", "u32", UUU, lambda a, b, c: a | b | c)
define("v_xor3_b32", "u32", UUU, lambda a, b, c: a ^ b ^ c)
define("v_xad_u32", "u32", UUU, lambda a, b, c: (a ^ b) + c)
define("v_add3_u32", "u32", UUU, lambda a, b, c: a + b + c)
define("v_lshl_add_u64", "u64", "u64 u32 u64", lambda a, s, c: (a << (s & U32(7)).astype(U64)) + c)
define("v_ffbh_u32 v_clz_i32_u32", "u32", "u32", _leading_zeros)
define("v_ffbl_b32 v_ctz_i32_b32", "u32", "u32", _trailing_zeros)
define("v_bfrev_b32", "u32", "u32", _reverse_bits)
define("v_bcnt_u32_b32", "u32", UU, _count_bits)
define("v_cndmask_b32", "u32", "u32 u32 m", lambda a, b, mask: np.where(mask, b, a))
define("v_cndmask_b16", "u16", "u16 u16 m", lambda a, b, mask: np.where(mask, b, a))
define("v_cvt_u32_u16", "u32", "u16", lambda a: a.astype(U32))
define("v_cvt_i32_i16", "i32", "i16", lambda a: a.astype(np.int32))
