"""Float arithmetic that numpy does not have with one rounding, and the approximate instructions."""

from __future__ import annotations

import numpy as np

UINT_OF = {np.dtype(np.float16): np.uint16, np.dtype(np.float32): np.uint32}


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a·b + c, rounded once to the operands' type (float32 or float16)."""
    return _fma_to_odd(a, b, c).astype(np.result_type(a, b, c))


def _fma_to_odd(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a·b + c in float64, where the product is exact and the sum rounded to odd: a rounding after it is harmless."""
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)  # Knuth's two-sum: total + error is exact
    bits = np.ascontiguousarray(total).view(np.uint64)
    odd_needed = (error != 0) & np.isfinite(total) & ((bits & np.uint64(1)) == 0)
    if odd_needed.any():
        towards = np.where(error > 0, np.inf, -np.inf)
        total = np.where(odd_needed, np.nextafter(total, towards), total)
    return total


def to_half_toward_zero(value: np.ndarray) -> np.ndarray:
    """float32 to float16, rounded toward zero."""
    half = value.astype(np.float16)
    away = np.abs(half.astype(np.float32)) > np.abs(value)
    return np.where(away, np.nextafter(half, np.float16(0)), half)


def to_bfloat16(value: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits (uint32 in the low half), to nearest even."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FC0) | bits >> np.uint32(16), rounded)


def approximate(exact: np.ndarray, kind: type = np.float32) -> np.ndarray:
    """`exact` (float64) rounded to `kind`, and in half of the cases one unit in the last place beside it.

    v_rcp, v_rsq, v_sqrt, v_exp and v_log may be one unit off on hardware. Which way is not documented, so code
    whose result depends on it must not pass here by luck: the choice is a hash of the result.
    """
    rounded = exact.astype(kind)
    uint = UINT_OF[np.dtype(kind)]
    bits = np.ascontiguousarray(rounded).view(uint)
    inexact = (rounded.astype(np.float64) != exact) & np.isfinite(rounded) & (rounded != 0)
    hashed = (bits.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(61)
    step = np.where(hashed == 0, 1, np.where(hashed == 1, -1, 0)) + np.where(hashed == 2, 1, 0)
    return (bits.astype(np.int64) + np.where(inexact, step, 0)).astype(uint).view(kind)


def reciprocal(value: np.ndarray) -> np.ndarray:
    """v_rcp_f32: one unit off at most, and correctly rounded for a significand of all ones.

    The latter is what the division sequence needs of it (all 2^23 significands were tried with results one unit off
    either way, and only that one then gave a wrong quotient), and division is documented to be exact.
    """
    exact = 1.0 / value.astype(np.float64)
    all_ones = np.ascontiguousarray(value).view(np.uint32) & np.uint32(0x7FFFFF) == np.uint32(0x7FFFFF)
    return np.where(all_ones, exact.astype(np.float32), approximate(exact))


def _exponent(value: np.ndarray) -> np.ndarray:
    """Biased exponent of float32."""
    bits = np.ascontiguousarray(value).view(np.uint32)
    return ((bits >> np.uint32(23)) & np.uint32(0xFF)).astype(np.int32)


def div_scale(value: np.ndarray, denominator: np.ndarray, numerator: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """v_div_scale_f32: `value`, which is one of the other two, scaled so that the division stays in range.

    Returns (scaled, flag); the flag asks v_div_fmas to scale back. Where both the reciprocal and the quotient would
    be denormal, AMD's text scales the denominator by 2^64, which overflows; it must be 2^-64, as it is here, for the
    sequence that compilers emit to divide correctly (tests/rocm/gcn/test_floats.py divides with it).
    """
    value, denominator, numerator = np.broadcast_arrays(value, denominator, numerator)
    of_denominator = value.view(np.uint32) == denominator.view(np.uint32)
    of_numerator = value.view(np.uint32) == numerator.view(np.uint32)
    up, down = value * np.float32(2.0**64), value * np.float32(2.0**-64)
    tiny = 2.0**-126
    inverse = np.abs(1.0 / denominator.astype(np.float64))
    quotient = np.abs(numerator.astype(np.float64) / denominator.astype(np.float64))
    inverse_denormal, quotient_denormal = inverse < tiny, quotient < tiny
    zero = (numerator == 0) | (denominator == 0)
    wide = _exponent(numerator) - _exponent(denominator) >= 96
    denominator_denormal = _exponent(denominator) == 0
    both = inverse_denormal & quotient_denormal
    cases = (zero, wide, denominator_denormal, both, inverse_denormal, quotient_denormal, _exponent(numerator) <= 23)
    scaled_denominator = np.where(of_denominator, up, value)
    lowered_denominator = np.where(of_denominator, down, value)
    scaled_numerator = np.where(of_numerator, up, value)
    nan = np.full_like(value, np.nan)
    result = np.select(cases, (nan, scaled_denominator, up, lowered_denominator, down, scaled_numerator, up), value)
    yes, no = np.ones(value.shape, bool), np.zeros(value.shape, bool)
    return result, np.select(cases[:6], (no, yes, no, yes, no, yes), no)


def div_fmas(a: np.ndarray, b: np.ndarray, c: np.ndarray, flag: np.ndarray) -> np.ndarray:
    """v_div_fmas_f32: a·b + c, scaled back by 2^±64 where the flag says so, and then rounded."""
    c = np.broadcast_to(c, np.broadcast_shapes(a.shape, b.shape, c.shape))
    exact = _fma_to_odd(a, b, c)
    scale = np.where(_exponent(c) > 127, 2.0**64, 2.0**-64)
    return np.where(flag, exact * scale, exact).astype(np.float32)


def div_fixup(quotient: np.ndarray, denominator: np.ndarray, numerator: np.ndarray) -> np.ndarray:
    """v_div_fixup_f32: the quotient, or what IEEE 754 wants for special operands."""
    quotient, denominator, numerator = np.broadcast_arrays(quotient, denominator, numerator)
    sign = np.signbit(denominator) ^ np.signbit(numerator)
    infinity, zero = np.float32(np.inf), np.float32(0)
    gap = _exponent(numerator) - _exponent(denominator)
    result = np.where(np.isnan(quotient), infinity, np.abs(quotient))  # the steps before overflowed
    result = np.where(gap < -150, zero, result)
    result = np.where(np.isinf(denominator) | (numerator == 0), zero, result)
    result = np.where((denominator == 0) | np.isinf(numerator), infinity, result)
    result = np.where(sign, -result, result)
    invalid = (denominator == 0) & (numerator == 0) | np.isinf(denominator) & np.isinf(numerator)
    result = np.where(invalid | np.isnan(denominator) | np.isnan(numerator), np.float32(np.nan), result)
    return result.astype(np.float32)


def maximum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The larger, the other of a NaN, +0 above -0."""
    return np.where(a == b, np.where(np.signbit(a), b, a), np.fmax(a, b))


def minimum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The smaller, the other of a NaN, -0 below +0."""
    return np.where(a == b, np.where(np.signbit(a), a, b), np.fmin(a, b))


def to_integer(value: np.ndarray, kind: type) -> np.ndarray:
    """Float to integer, toward zero, saturating; NaN gives 0."""
    info = np.iinfo(kind)
    clipped = np.clip(np.trunc(np.nan_to_num(value.astype(np.float64), nan=0.0)), info.min, info.max)
    return clipped.astype(np.int64).astype(kind)
