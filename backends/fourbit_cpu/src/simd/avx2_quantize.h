// What quantizing and dequantizing need beyond simd/avx2.h.
#pragma once

#include "nearest.inl"
#include "simd/avx2.h"

namespace fourbit::FOURBIT_ISA {

// The largest magnitude. As integers, so that NaN is above infinity and infinity above every number.
struct Largest {
  __m256i bits = _mm256_setzero_si256();
  void add(F v) {
    const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
    bits = _mm256_max_epu32(bits, magnitude);
  }
  uint32_t result() const {
    __m128i half = _mm_max_epu32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(half));
  }
};

// Whether a value occurs.
struct Contains {
  F value, found = zero();
  explicit Contains(float v) : value(splat(v)) {}
  void add(F v) { found = _mm256_or_ps(found, _mm256_cmp_ps(v, value, _CMP_EQ_OQ)); }
  bool result() const { return _mm256_movemask_ps(found) != 0; }
};

// A codebook of 16 values: a binary search in registers. A comparison gives -1, so that indices count down from 0
// and every table is laid out for their low bits: index -i at lane 8 - i or byte 16 - i.
struct Encoder {
  __m256 levels[4];  // 1, 2, 4 and 8 edges
  __m256i codes;     // in both halves
};
inline Encoder make_encoder(const float* code) {
  const Edges<16> sorted = find_edges<16>(code);
  Encoder encoder;
  for (int level = 0; level < 4; ++level) {
    const int width = 1 << level, step = 16 / width;
    float lanes[8];
    for (int i = 0; i < 8; ++i) lanes[(8 - i) % 8] = sorted.edges[i % width * step + step / 2 - 1];
    encoder.levels[level] = load(lanes);
  }
  uint8_t codes[16];
  for (int i = 0; i < 16; ++i) codes[(16 - i) % 16] = sorted.codes[i];
  encoder.codes = _mm256_broadcastsi128_si256(load128(codes));
  return encoder;
}

// Minus the number of edges below each value.
inline __m256i minus_edges_below(F v, const Encoder& encoder) {
  __m256i index = _mm256_castps_si256(_mm256_cmp_ps(v, encoder.levels[0], _CMP_GT_OQ));
  for (int level = 1; level < 4; ++level) {
    const F edge = _mm256_permutevar8x32_ps(encoder.levels[level], index);
    const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(v, edge, _CMP_GT_OQ));
    index = _mm256_add_epi32(_mm256_add_epi32(index, index), above);
  }
  return index;
}

// 64 values of at most about 1 in magnitude to 32 bytes.
inline void encode64(const F* values, const Encoder& encoder, uint8_t* out) {
  for (int group = 0; group < 2; ++group, values += 4, out += 16) {
    __m256i index[4];
    for (int i = 0; i < 4; ++i) index[i] = minus_edges_below(values[i], encoder);
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(index[0], index[1]),  //
                                             _mm256_packs_epi32(index[2], index[3]));
    const __m256i codes = _mm256_shuffle_epi8(encoder.codes, _mm256_and_si256(bytes, _mm256_set1_epi8(15)));
    const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));  // 16 times the even, and the odd
    // each half has 2 bytes of each vector
    const __m256i packed = _mm256_packus_epi16(pairs, pairs);
    store128(out, _mm_unpacklo_epi16(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1)));
  }
}

// 64 values to as many codes of a codebook of 256.
inline void search64(const F* values, const Search256& search, uint8_t* out) {
  const __m256 levels_1_to_3 = load(search.tree), level_4 = load(search.tree + 8);
  for (int group = 0; group < 8; ++group) {
    const F v = values[group];
    __m256i p = _mm256_set1_epi32(1);
    const auto descend = [&](__m256 edge) {
      p = _mm256_sub_epi32(_mm256_add_epi32(p, p), _mm256_castps_si256(_mm256_cmp_ps(v, edge, _CMP_GT_OQ)));
    };
    for (int level = 0; level < 3; ++level) descend(_mm256_permutevar8x32_ps(levels_1_to_3, p));
    descend(_mm256_permutevar8x32_ps(level_4, p));
    for (int level = 0; level < 4; ++level) descend(_mm256_i32gather_ps(search.tree, p, 4));
    int index[8];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(index), p);
    for (int i = 0; i < 8; ++i) out[8 * group + i] = search.codes[index[i] - 256];
  }
}

// A codebook's values times a scale, rounded to 16 bits: their low and their high bytes, in both halves.
struct HalfTable {
  __m256i low, high;
};
template <bool Bf16>
HalfTable make_half_table(const float* code, float scale) {
  uint16_t half[16];
  for (int i = 0; i < 16; i += 8) {
    const F scaled = mul(load(code + i), splat(scale));
    Bf16 ? narrow_bf16(half + i, scaled) : narrow_f16(half + i, scaled);
  }
  const __m128i a = load128(half), b = load128(half + 8), byte = _mm_set1_epi16(0xff);
  const __m128i low = _mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte));
  const __m128i high = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
  return {_mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high)};
}
// 32 weights of 16 bytes, in order.
inline void decode32(const uint8_t* bytes, const HalfTable& table, uint16_t* out) {
  // bytes 0-7 in the lower half, 8-15 in the upper one, each as a word of its own: high nibble first
  const __m256i words = _mm256_cvtepu8_epi16(load128(bytes));
  const __m256i nibbles = _mm256_or_si256(_mm256_srli_epi16(words, 4), _mm256_slli_epi16(words, 8));
  const __m256i index = _mm256_and_si256(nibbles, _mm256_set1_epi8(15));
  const __m256i low = _mm256_shuffle_epi8(table.low, index), high = _mm256_shuffle_epi8(table.high, index);
  const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute2x128_si256(a, b, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_permute2x128_si256(a, b, 0x31));
}

}  // namespace fourbit::FOURBIT_ISA
