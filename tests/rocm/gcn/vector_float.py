"""Float vector instructions: name to (result type, source types, function)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.rocm.gcn import floats

F16, F32, F64, U32 = np.float16, np.float32, np.float64, np.uint32
Function = Callable[..., np.ndarray]
FLOAT_OPS: dict[str, tuple[str, str, Function]] = {}


def define(names: str, result: str, sources: str, function: Function) -> None:
    """Register `function` under each of the blank-separated `names`."""
    for name in names.split():
        FLOAT_OPS[name] = (result, sources, function)


def _median(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    low, high = floats.minimum(a, b), floats.maximum(a, b)
    ordinary = floats.maximum(low, floats.minimum(high, c))
    smallest = floats.minimum(floats.minimum(a, b), c)
    return np.where(np.isnan(a) | np.isnan(b) | np.isnan(c), smallest, ordinary)


def _pack_halves(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    low, high = np.broadcast_arrays(low, high)
    low, high = np.ascontiguousarray(low, F16), np.ascontiguousarray(high, F16)
    return low.view(np.uint16).astype(U32) | high.view(np.uint16).astype(U32) << U32(16)


def _pack_halves_toward_zero(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return _pack_halves(floats.to_half_toward_zero(low), floats.to_half_toward_zero(high))


def _pack_bfloat16(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return floats.to_bfloat16(low) | floats.to_bfloat16(high) << U32(16)


def _halves(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.ascontiguousarray(value).view(F16)
    return pairs[..., 0::2].astype(F64), pairs[..., 1::2].astype(F64)


def _bfloat16_halves(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    value = np.ascontiguousarray(value)
    return (value << U32(16)).view(F32).astype(F64), (value & U32(0xFFFF0000)).view(F32).astype(F64)


def _dot(halves: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Function:
    def dot(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        (a0, a1), (b0, b1) = halves(a), halves(b)
        return (a0 * b0 + a1 * b1 + c.astype(F64)).astype(F32)

    return dot


def _scale_by_power(value: np.ndarray, power: np.ndarray) -> np.ndarray:
    return np.ldexp(value.astype(F64), np.clip(power, -400, 400)).astype(value.dtype)


def _ubyte(byte: int) -> Function:
    return lambda a: ((a >> U32(8 * byte)) & U32(0xFF)).astype(F32)


def _fraction(a: np.ndarray) -> np.ndarray:
    return np.minimum(a - np.floor(a), np.nextafter(a.dtype.type(1), a.dtype.type(0)))


for kind in ("f32", "f16"):
    two, three = f"{kind} {kind}", f"{kind} {kind} {kind}"
    define(f"v_add_{kind}", kind, two, lambda a, b: a + b)
    define(f"v_sub_{kind}", kind, two, lambda a, b: a - b)
    define(f"v_subrev_{kind}", kind, two, lambda a, b: b - a)
    define(f"v_mul_{kind}", kind, two, lambda a, b: a * b)
    define(f"v_fma_{kind}", kind, three, floats.fma)
    define(f"v_fmac_{kind}", kind, f"{two} d{kind}", floats.fma)
    define(f"v_fmaak_{kind}", kind, three, floats.fma)
    define(f"v_fmamk_{kind}", kind, three, floats.fma)
    define(f"v_max_{kind} v_max_num_{kind}", kind, two, floats.maximum)
    define(f"v_min_{kind} v_min_num_{kind}", kind, two, floats.minimum)
    define(f"v_med3_{kind} v_med3_num_{kind}", kind, three, _median)
    define(f"v_max3_{kind} v_max3_num_{kind}", kind, three, lambda a, b, c: floats.maximum(floats.maximum(a, b), c))
    define(f"v_min3_{kind} v_min3_num_{kind}", kind, three, lambda a, b, c: floats.minimum(floats.minimum(a, b), c))
    define(f"v_maxmin_{kind} v_maxmin_num_{kind}", kind, three, lambda a, b, c: floats.minimum(floats.maximum(a, b), c))
    define(f"v_minmax_{kind} v_minmax_num_{kind}", kind, three, lambda a, b, c: floats.maximum(floats.minimum(a, b), c))
    define(f"v_trunc_{kind}", kind, kind, np.trunc)
    define(f"v_floor_{kind}", kind, kind, np.floor)
    define(f"v_ceil_{kind}", kind, kind, np.ceil)
    define(f"v_rndne_{kind}", kind, kind, np.rint)
    define(f"v_fract_{kind}", kind, kind, _fraction)
define("v_mul_legacy_f32", "f32", "f32 f32", lambda a, b: np.where((a == 0) | (b == 0), F32(0), a * b))
define("v_rcp_f32 v_rcp_iflag_f32", "f32", "f32", floats.reciprocal)
define("v_rsq_f32", "f32", "f32", lambda a: floats.approximate(1.0 / np.sqrt(a.astype(F64))))
define("v_sqrt_f32", "f32", "f32", lambda a: floats.approximate(np.sqrt(a.astype(F64))))
define("v_exp_f32", "f32", "f32", lambda a: floats.approximate(np.exp2(a.astype(F64))))
define("v_log_f32", "f32", "f32", lambda a: floats.approximate(np.log2(a.astype(F64))))
define("v_div_fixup_f32", "f32", "f32 f32 f32", floats.div_fixup)
define("v_ldexp_f32", "f32", "f32 i32", _scale_by_power)
define("v_frexp_mant_f32", "f32", "f32", lambda a: np.where(np.isfinite(a), np.frexp(a)[0], a))
define("v_frexp_exp_i32_f32", "i32", "f32", lambda a: np.where(np.isfinite(a), np.frexp(a)[1], 0).astype(np.int32))
define("v_cvt_f32_f16", "f32", "f16", lambda a: a.astype(F32))
define("v_cvt_f16_f32", "f16", "f32", lambda a: a.astype(F16))
define("v_cvt_f32_bf16", "f32", "u16", lambda a: (a.astype(U32) << U32(16)).view(F32))
define("v_cvt_f64_f32", "f64", "f32", lambda a: a.astype(F64))
define("v_cvt_f32_f64", "f32", "f64", lambda a: a.astype(F32))
define("v_cvt_f32_u32", "f32", "u32", lambda a: a.astype(F32))
define("v_cvt_f32_i32", "f32", "i32", lambda a: a.astype(F32))
define("v_cvt_u32_f32", "u32", "f32", lambda a: floats.to_integer(a, np.uint32))
define("v_cvt_i32_f32", "i32", "f32", lambda a: floats.to_integer(a, np.int32))
define("v_cvt_f16_u16", "f16", "u16", lambda a: a.astype(F16))
define("v_cvt_f16_i16", "f16", "i16", lambda a: a.astype(F16))
for position in range(4):
    define(f"v_cvt_f32_ubyte{position}", "f32", "u32", _ubyte(position))
define("v_cvt_pkrtz_f16_f32 v_cvt_pk_rtz_f16_f32", "u32", "f32 f32", _pack_halves_toward_zero)
define("v_cvt_pk_f16_f32", "u32", "f32 f32", lambda a, b: _pack_halves(a.astype(F16), b.astype(F16)))
define("v_cvt_pk_bf16_f32", "u32", "f32 f32", _pack_bfloat16)
define("v_pack_b32_f16", "u32", "f16 f16", _pack_halves)
define("v_add_f64", "f64", "f64 f64", lambda a, b: a + b)
define("v_mul_f64", "f64", "f64 f64", lambda a, b: a * b)
define("v_dot2_f32_f16", "f32", "u32 u32 f32", _dot(_halves))
define("v_dot2c_f32_f16 v_dot2acc_f32_f16", "f32", "u32 u32 df32", _dot(_halves))
define("v_dot2_f32_bf16", "f32", "u32 u32 f32", _dot(_bfloat16_halves))
define("v_dot2c_f32_bf16", "f32", "u32 u32 df32", _dot(_bfloat16_halves))
