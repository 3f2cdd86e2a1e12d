// What quantizing and dequantizing need beyond simd/avx512.h.
#pragma once

#include "nearest.inl"
#include "simd/avx512.h"

namespace fourbit::FOURBIT_ISA {

// The largest magnitude. As integers, so that NaN is above infinity and infinity above every number.
struct Largest {
  __m512i bits = _mm512_setzero_si512();
  void add(F v) {
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
    bits = _mm512_max_epu32(bits, magnitude);
  }
  uint32_t result() const { return _mm512_reduce_max_epu32(bits); }
};

// Whether a value occurs.
struct Contains {
  F value;
  __mmask16 found = 0;
  explicit Contains(float v) : value(splat(v)) {}
  void add(F v) { found |= _mm512_cmp_ps_mask(v, value, _CMP_EQ_OQ); }
  bool result() const { return found != 0; }
};

// A codebook of 16 values. Where each of 32 equal buckets of [-1, 1] has at most one edge (NF4 and FP4 do), the
// bucket of a value leaves one comparison. Else a binary search in registers.
struct Encoder {
  __m512 bucket_edge[2];
  __m512i bucket_first[2];  // edges in the buckets below
  __m512 edges[4];          // beginning with the first that a level of the search can ask for
  __m512i codes;            // in each 128 bits
  bool bucketed;
};

// Never decreasing in v, so that what is in another bucket than an edge is on the side of it that the bucket is.
// A little less than 32 buckets wide: a largest element times its reciprocal may be just above 1.
inline __m512i bucket_of(F v) { return _mm512_cvttps_epi32(fma(v, splat(15.75f), splat(16.0f))); }

inline bool fill_buckets(const Edges<16>& sorted, Encoder& encoder) {
  float edge[32];
  int first[32], bucket[16];
  _mm512_storeu_si512(bucket, bucket_of(load(sorted.edges)));
  int next = 0;
  for (int i = 0; i < 32; ++i) {
    edge[i] = sorted.edges[15];
    first[i] = next;
    if (bucket[next] == i) edge[i] = sorted.edges[next++];
  }
  encoder.bucket_edge[0] = load(edge);
  encoder.bucket_edge[1] = load(edge + 16);
  encoder.bucket_first[0] = _mm512_loadu_si512(first);
  encoder.bucket_first[1] = _mm512_loadu_si512(first + 16);
  return !(sorted.edges[next] < sorted.edges[15]);  // none is left over
}

inline Encoder make_encoder(const float* code) {
  const Edges<16> sorted = find_edges<16>(code);
  Encoder encoder;
  float shifted[32];
  for (int i = 0; i < 32; ++i) shifted[i] = sorted.edges[i < 16 ? i : 15];
  encoder.edges[0] = splat(shifted[7]);
  encoder.edges[1] = load(shifted + 3);
  encoder.edges[2] = load(shifted + 1);
  encoder.edges[3] = load(shifted);
  encoder.codes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sorted.codes)));
  encoder.bucketed = fill_buckets(sorted, encoder);
  return encoder;
}

// How many edges are below each value.
inline __m512i edges_below_by_bucket(F v, const Encoder& encoder) {
  const __m512i bucket = bucket_of(v);
  const F edge = _mm512_permutex2var_ps(encoder.bucket_edge[0], bucket, encoder.bucket_edge[1]);
  const __m512i first = _mm512_permutex2var_epi32(encoder.bucket_first[0], bucket, encoder.bucket_first[1]);
  const __mmask16 above = _mm512_cmp_ps_mask(v, edge, _CMP_GT_OQ);
  return _mm512_mask_add_epi32(first, above, first, _mm512_set1_epi32(1));
}
inline __m512i edges_below_by_search(F v, const Encoder& encoder) {
  __mmask16 above = _mm512_cmp_ps_mask(v, encoder.edges[0], _CMP_GT_OQ);
  __m512i index = _mm512_maskz_mov_epi32(above, _mm512_set1_epi32(8));
  above = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(index, encoder.edges[1]), _CMP_GT_OQ);
  index = _mm512_mask_add_epi32(index, above, index, _mm512_set1_epi32(4));
  above = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(index, encoder.edges[2]), _CMP_GT_OQ);
  index = _mm512_mask_add_epi32(index, above, index, _mm512_set1_epi32(2));
  above = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(index, encoder.edges[3]), _CMP_GT_OQ);
  return _mm512_mask_add_epi32(index, above, index, _mm512_set1_epi32(1));
}

// 64 values of at most about 1 in magnitude to 32 bytes.
inline void encode64(const F* values, const Encoder& encoder, uint8_t* out) {
  __m512i index[4];
  if (encoder.bucketed) {
    for (int i = 0; i < 4; ++i) index[i] = edges_below_by_bucket(values[i], encoder);
  } else {
    for (int i = 0; i < 4; ++i) index[i] = edges_below_by_search(values[i], encoder);
  }
  const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(index[0], index[1]),  //
                                            _mm512_packs_epi32(index[2], index[3]));
  // each 128 bits have 4 elements of each vector
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i codes = _mm512_shuffle_epi8(encoder.codes, _mm512_permutexvar_epi32(order, bytes));
  const __m512i pairs = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x0110));  // 16 times the even, and the odd
  store256(out, _mm512_cvtepi16_epi8(pairs));
}

// 64 values to as many codes of a codebook of 256.
inline void search64(const F* values, const Search256& search, uint8_t* out) {
  const __m512 levels_1_to_4 = load(search.tree), level_5 = load(search.tree + 16);
  const __m512 level_6_low = load(search.tree + 32), level_6_high = load(search.tree + 48);
  const __m512i one = _mm512_set1_epi32(1);
  for (int i = 0; i < 4; ++i) {
    const F v = values[i];
    __m512i p = one;
    const auto descend = [&](__m512 edge) {
      const __mmask16 above = _mm512_cmp_ps_mask(v, edge, _CMP_GT_OQ);
      p = _mm512_add_epi32(p, p);
      p = _mm512_mask_add_epi32(p, above, p, one);
    };
    for (int level = 0; level < 4; ++level) descend(_mm512_permutexvar_ps(p, levels_1_to_4));
    descend(_mm512_permutexvar_ps(p, level_5));
    descend(_mm512_permutex2var_ps(level_6_low, p, level_6_high));
    descend(_mm512_i32gather_ps(p, search.tree, 4));
    descend(_mm512_i32gather_ps(p, search.tree, 4));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * i), _mm512_cvtepi32_epi8(p));  // p - 256
  }
  if (search.ascending) return;
  for (int i = 0; i < 64; ++i) out[i] = search.codes[out[i]];
}

// A codebook's values times a scale, rounded to 16 bits, twice: vpermw reads 5 bits of an index, of which the
// fifth is the neighbour's.
struct HalfTable {
  __m512i values;
};
template <bool Bf16>
HalfTable make_half_table(const float* code, float scale) {
  const F scaled = mul(load(code), splat(scale));
  const __m256i half = Bf16 ? _mm512_cvtepi32_epi16(round_bf16(scaled)) : round_f16(scaled);
  return {_mm512_broadcast_i64x4(half)};
}
// 32 weights of 16 bytes, in order.
inline void decode32(const uint8_t* bytes, const HalfTable& table, uint16_t* out) {
  const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  const __m512i index = _mm512_or_si512(_mm512_srli_epi32(both, 4), _mm512_slli_epi32(both, 16));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table.values));
}

}  // namespace fourbit::FOURBIT_ISA
