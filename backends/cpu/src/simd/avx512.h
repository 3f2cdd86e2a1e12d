// The vector primitives in AVX512 (F, BW, VL, DQ).
#pragma once

#include <immintrin.h>

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

struct Exact {
  using Table = FOURBIT_ISA::Table;
  static Table table(const float* code) { return make_table(code, 1.0f); }
  // Lane i has the two bytes of elements 4i to 4i + 3.
  static void decode64(const uint8_t* bytes, const Table& table, F* out) {
    const __m512i pairs = _mm512_cvtepu16_epi32(load256(bytes));
    out[0] = lookup(table, _mm512_srli_epi32(pairs, 4));
    out[1] = lookup(table, pairs);
    out[2] = lookup(table, _mm512_srli_epi32(pairs, 12));
    out[3] = lookup(table, _mm512_srli_epi32(pairs, 8));
  }
  static constexpr int element(int position) { return position % W * 4 + position / W; }
  static F scales(int, F low, F high) { return _mm512_mask_mov_ps(low, 0xff00, high); }
};
using Rounded = Exact;

template <int TileM>
inline constexpr int tile_n = TileM == 4 ? 6 : TileM == 3 ? 8 : TileM == 2 ? 12 : 24;
constexpr int MAX_TILE_M = 4;

}  // namespace fourbit::FOURBIT_ISA
