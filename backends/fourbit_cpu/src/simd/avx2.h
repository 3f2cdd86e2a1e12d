// The vector primitives in AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "simd/convert.h"

namespace fourbit::FOURBIT_ISA {

using F = __m256;
constexpr int W = 8;

inline F zero() { return _mm256_setzero_ps(); }
inline F splat(float value) { return _mm256_set1_ps(value); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(F v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline void store128(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }

inline F widen_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16));
}
inline F widen_f16(const uint16_t* p) { return _mm256_cvtph_ps(load128(p)); }

// Bits of bfloat16 in the low half of each lane.
inline __m256i round_bf16(F v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan);
}
inline void narrow_bf16(uint16_t* p, F v) {
  const __m256i bits = round_bf16(v);
  store128(p, _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
}
inline void narrow_f16(uint16_t* p, F v) {
  store128(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// The W x W block of its rows, turned.
inline void transpose(F (&r)[W]) {
  F t[W];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// The values' bytes: plane b has byte b of each of the 16, in both halves, for vpshufb.
struct Table {
  __m256i planes[4];
};
inline Table make_table(const float* code, float scale) {
  const __m256i low = _mm256_castps_si256(mul(load(code), splat(scale)));
  const __m256i high = _mm256_castps_si256(mul(load(code + 8), splat(scale)));
  // the same byte of each value together within each half, then the halves' dwords in order
  const __m256i gather = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                          0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m256i a = _mm256_shuffle_epi8(low, gather), b = _mm256_shuffle_epi8(high, gather);
  // a: [p0 p1 p2 p3 of values 0-3 | of 4-7], b: [of 8-11 | of 12-15]
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i a2 = _mm256_permutevar8x32_epi32(a, order), b2 = _mm256_permutevar8x32_epi32(b, order);
  const __m256i p02 = _mm256_unpacklo_epi64(a2, b2), p13 = _mm256_unpackhi_epi64(a2, b2);
  Table table;
  table.planes[0] = _mm256_permute4x64_epi64(p02, 0x44);
  table.planes[1] = _mm256_permute4x64_epi64(p13, 0x44);
  table.planes[2] = _mm256_permute4x64_epi64(p02, 0xee);
  table.planes[3] = _mm256_permute4x64_epi64(p13, 0xee);
  return table;
}

// 16 bytes as 32 nibbles: the even elements (high nibbles) in the low half, the odd ones in the high half.
inline __attribute__((always_inline)) __m256i nibbles32(const uint8_t* bytes) {
  const __m128i b = load128(bytes);
  const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_srli_epi16(b, 4)), b, 1);
  return _mm256_and_si256(both, _mm256_set1_epi8(15));
}

// Vector v has elements 8v + {0, 2, 4, 6, 1, 3, 5, 7}.
inline __attribute__((always_inline)) void decode32_even_odd(const uint8_t* bytes, const Table& table, F* out) {
  const __m256i index = nibbles32(bytes);
  const __m256i p0 = _mm256_shuffle_epi8(table.planes[0], index), p1 = _mm256_shuffle_epi8(table.planes[1], index);
  const __m256i p2 = _mm256_shuffle_epi8(table.planes[2], index), p3 = _mm256_shuffle_epi8(table.planes[3], index);
  const __m256i low0 = _mm256_unpacklo_epi8(p0, p1), low1 = _mm256_unpackhi_epi8(p0, p1);
  const __m256i high0 = _mm256_unpacklo_epi8(p2, p3), high1 = _mm256_unpackhi_epi8(p2, p3);
  out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0));
  out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0));
  out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1));
  out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1));
}

inline void decode32(const uint8_t* bytes, const Table& table, F* out) {
  decode32_even_odd(bytes, table, out);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int v = 0; v < 4; ++v) out[v] = _mm256_permutevar8x32_ps(out[v], order);
}

// Vectors from one on that have the same scales: a sum over them needs scaling once.
constexpr int SAME_SCALES = 32 / W;

// For products of few rows: unscaled values of 128 weights, in the order that costs least, SAME_SCALES vectors of
// them at a time. `element(i)` is the element at position i, so that x can be brought into the same order once.
struct Exact {
  using Table = FOURBIT_ISA::Table;
  static constexpr int VECTORS = 128 / W;
  static Table table(const float* code) { return make_table(code, 1.0f); }
  static inline __attribute__((always_inline)) void decode_part(const uint8_t* bytes, int part, const Table& table,
                                                               F* out) {
    decode32_even_odd(bytes + 16 * part, table, out);
  }
  static constexpr int element(int position) {
    const int lane = position % 8;
    return position / 8 * 8 + (lane < 4 ? 2 * lane : 2 * lane - 7);
  }
};

// Values rounded to bfloat16 have two bytes: half the lookups, and shifts and masks in place of the last unpacking.
struct Rounded {
  static constexpr int VECTORS = 128 / W;
  struct Table {
    __m256i low, high;
  };
  static Table table(const float* code) {
    float rounded[16];
    for (int i = 0; i < 16; ++i) rounded[i] = bf16_to_float(float_to_bf16(code[i]));
    const FOURBIT_ISA::Table exact = make_table(rounded, 1.0f);
    return {exact.planes[2], exact.planes[3]};
  }
  static inline __attribute__((always_inline)) void decode_part(const uint8_t* bytes, int part, const Table& table,
                                                               F* out) {
    const __m256i index = nibbles32(bytes + 16 * part);
    const __m256i low = _mm256_shuffle_epi8(table.low, index), high = _mm256_shuffle_epi8(table.high, index);
    const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    out[0] = _mm256_castsi256_ps(_mm256_slli_epi32(a, 16));
    out[1] = _mm256_castsi256_ps(_mm256_and_si256(a, mask));
    out[2] = _mm256_castsi256_ps(_mm256_slli_epi32(b, 16));
    out[3] = _mm256_castsi256_ps(_mm256_and_si256(b, mask));
  }
  static constexpr int element(int position) {
    const int vector = position / 8, lane = position % 8;
    return vector / 2 * 16 + vector % 2 * 2 + lane % 4 * 4 + lane / 4;
  }
};

// The scales of 128 weights: two of 64 each, or four of 32.
struct Scales {
  F parts[4];
  static Scales halves(float first, float second) {
    return {{splat(first), splat(first), splat(second), splat(second)}};
  }
  static Scales quarters(const float* s) { return {{splat(s[0]), splat(s[1]), splat(s[2]), splat(s[3])}}; }
  F of(int vector) const { return parts[vector / (32 / W)]; }
};

template <int TileM>
inline constexpr int tile_n = TileM == 3 ? 4 : TileM == 2 ? 6 : 12;
// Sums that one row of x is kept in, in few-row products.
constexpr int DOT_CHAINS = 2;
// Rows of the weight that share a load of x there.
constexpr int DOT_ROWS = 1;
constexpr int MAX_TILE_M = 2;

}  // namespace fourbit::FOURBIT_ISA
