// The vector primitives in AVX512 (F, BW, VL, DQ).
#pragma once

// gcc 12 takes the undefined operand of its own intrinsics for a mistake (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include <cstdint>

#include "simd/convert.h"

namespace fourbit::FOURBIT_ISA {

using F = __m512;
constexpr int W = 16;

inline F zero() { return _mm512_setzero_ps(); }
inline F splat(float value) { return _mm512_set1_ps(value); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(F v) { return _mm512_reduce_add_ps(v); }

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store256(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

inline F widen_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load256(p)), 16));
}
inline F widen_f16(const uint16_t* p) { return _mm512_cvtph_ps(load256(p)); }

// Bits of bfloat16 in the low half of each lane. Not vcvtneps2bf16, which takes subnormals for zero.
inline __m512i round_bf16(F v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7fc0));
}
inline void narrow_bf16(uint16_t* p, F v) { store256(p, _mm512_cvtepi32_epi16(round_bf16(v))); }
inline __m256i round_f16(F v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void narrow_f16(uint16_t* p, F v) { store256(p, round_f16(v)); }

// The W x W block of its rows, turned.
inline void transpose(F (&r)[W]) {
  F t[W];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  // r[4g + c], quarter l: column 4l + c of rows 4g to 4g + 3
  for (int c = 0; c < 4; ++c) {
    const F a = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88), b = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const F d = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd), e = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_f32x4(a, b, 0x88);
    t[8 + c] = _mm512_shuffle_f32x4(a, b, 0xdd);
    t[4 + c] = _mm512_shuffle_f32x4(d, e, 0x88);
    t[12 + c] = _mm512_shuffle_f32x4(d, e, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

struct Table {
  __m512 values;
};
inline Table make_table(const float* code, float scale) { return {mul(load(code), splat(scale))}; }

// vpermps reads the low 4 bits of an index alone, so that no nibble needs masking.
inline F lookup(const Table& table, __m512i index) { return _mm512_permutexvar_ps(index, table.values); }

inline void decode32(const uint8_t* bytes, const Table& table, F* out) {
  const __m512i both = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  const __m512i shift = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
  const __m512i first = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  const __m512i second = _mm512_setr_epi32(2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  out[0] = lookup(table, _mm512_srlv_epi32(_mm512_permutexvar_epi32(first, both), shift));
  out[1] = lookup(table, _mm512_srlv_epi32(_mm512_permutexvar_epi32(second, both), shift));
}

// Vectors from one on that have the same scales: a sum over them needs scaling once.
constexpr int SAME_SCALES = 8;

// For products of few rows: unscaled values of 128 weights, in the order that costs least, SAME_SCALES vectors of
// them at a time. `element(i)` is the element at position i, so that x can be brought into the same order once. Lane i of each vector has one of the
// elements 8i to 8i + 7, so that the first 64 weights are the low half of all of them.
struct Exact {
  using Table = FOURBIT_ISA::Table;
  static constexpr int VECTORS = 8;
  static Table table(const float* code) { return make_table(code, 1.0f); }
  static inline __attribute__((always_inline)) void decode_part(const uint8_t* bytes, int, const Table& table, F* out) {
    const __m512i b = _mm512_loadu_si512(bytes);
    out[0] = lookup(table, _mm512_srli_epi32(b, 4));
    out[1] = lookup(table, b);
    out[2] = lookup(table, _mm512_srli_epi32(b, 12));
    out[3] = lookup(table, _mm512_srli_epi32(b, 8));
    out[4] = lookup(table, _mm512_srli_epi32(b, 20));
    out[5] = lookup(table, _mm512_srli_epi32(b, 16));
    out[6] = lookup(table, _mm512_srli_epi32(b, 28));
    out[7] = lookup(table, _mm512_srli_epi32(b, 24));
  }
  static constexpr int element(int position) { return position % W * 8 + position / W; }
};
// The scales of 128 weights, for vectors in that order: two of 64 each, or four of 32.
struct Scales {
  F lanes;
  static Scales halves(float first, float second) {
    return {_mm512_mask_mov_ps(splat(first), 0xff00, splat(second))};
  }
  static Scales quarters(const float* s) {
    return {_mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                                  _mm512_castps128_ps512(_mm_loadu_ps(s)))};
  }
  F of(int) const { return lanes; }
};
using Rounded = Exact;

template <int TileM>
inline constexpr int tile_n = TileM == 4 ? 6 : TileM == 3 ? 8 : TileM == 2 ? 12 : 24;
// Sums that one row of x is kept in, in few-row products.
constexpr int DOT_CHAINS = 2;
// Rows of the weight that share a load of x there.
constexpr int DOT_ROWS = 2;
constexpr int MAX_TILE_M = 4;

}  // namespace fourbit::FOURBIT_ISA
