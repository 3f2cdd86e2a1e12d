// What the matrix product multiplies: float32 by float32, or pairs of bfloat16 where the processor has a dot
// product of them. An Element says how x and the weight are brought into that form.
#pragma once

#include <cstring>

#include "kernels.h"

namespace fourbit::FOURBIT_ISA {

inline float float_at(const void* source, Dtype dtype, int64_t index) {
  if (dtype == FLOAT32) return static_cast<const float*>(source)[index];
  const uint16_t half = static_cast<const uint16_t*>(source)[index];
  return dtype == BFLOAT16 ? bf16_to_float(half) : f16_to_float(half);
}

// A constant as an argument.
template <int Value>
struct Number {
  static constexpr int value = Value;
};

// W values from any dtype, and to any.
inline F load_as(const void* source, Dtype dtype, int64_t index) {
  if (dtype == FLOAT32) return load(static_cast<const float*>(source) + index);
  const uint16_t* half = static_cast<const uint16_t*>(source) + index;
  return dtype == BFLOAT16 ? widen_bf16(half) : widen_f16(half);
}
inline void store_as(void* target, Dtype dtype, F value) {
  if (dtype == FLOAT32)
    store(static_cast<float*>(target), value);
  else if (dtype == BFLOAT16)
    narrow_bf16(static_cast<uint16_t*>(target), value);
  else
    narrow_f16(static_cast<uint16_t*>(target), value);
}

// The first `count` lanes alone.
inline void store_some(void* target, Dtype dtype, F value, int64_t count) {
  if (count == W) return store_as(target, dtype, value);
  alignas(64) char values[W * 4];
  store_as(values, dtype, value);
  std::memcpy(target, values, static_cast<size_t>(count * size_of(dtype)));
}

inline F bias_lanes(const void* bias, Dtype dtype, int64_t first, int64_t count) {
  if (bias == nullptr) return zero();
  if (count == W) return load_as(bias, dtype, first);
  float values[W] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = float_at(bias, dtype, first + i);
  return load(values);
}

inline bool finite(F value) {
  float values[W];
  store(values, value);
  bool all = true;
  for (int i = 0; i < W; ++i) all &= values[i] - values[i] == 0.0f;
  return all;
}

struct FloatElement {
  using Type = float;
  using Vector = F;
  using Table = FOURBIT_ISA::Table;
  static constexpr int STEP = 1;  // terms of the sum that one value holds
  static constexpr int64_t CHAIN = 128;  // steps summed before they are added to the rest
  static constexpr Dtype DTYPE = FLOAT32;

  static F load_lanes(const float* p) { return load(p); }
  static F broadcast(const float* p) { return splat(*p); }
  static F multiply_add(F x, F w, F sum) { return fma(x, w, sum); }

  static Table table(const float* code, float scale) { return make_table(code, scale); }
  static void decode32(const uint8_t* bytes, const Table& table, float* out) {
    F values[32 / W];
    FOURBIT_ISA::decode32(bytes, table, values);
    for (int i = 0; i < 32 / W; ++i) store(out + i * W, values[i]);
  }
  static void convert(const void* source, Dtype dtype, int64_t index, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + W <= count; i += W) store(out + i, load_as(source, dtype, index + i));
    for (; i < count; ++i) out[i] = float_at(source, dtype, index + i);
  }
  struct Codes {
    Exact::Table table;
  };
  static Codes codes(const float* code) { return {Exact::table(code)}; }
  static void decode128(const uint8_t* bytes, const Codes& codes, float first, float second, float* out) {
    const Scales scales = Scales::halves(first, second);
#pragma GCC unroll 4
    for (int v = 0; v < Exact::VECTORS; v += SAME_SCALES) {
      F values[SAME_SCALES];
      Exact::decode_part(bytes, v / SAME_SCALES, codes.table, values);
#pragma GCC unroll 128
      for (int i = 0; i < SAME_SCALES; ++i) store(out + (v + i) * W, mul(values[i], scales.of(v)));
    }
  }
  static void order(float* x) {
    float natural[128];
    std::memcpy(natural, x, sizeof natural);
    for (int i = 0; i < 128; ++i) x[i] = natural[Exact::element(i)];
  }
  static void interleave(const float* rows, int count, float* out) { std::memcpy(out, rows, sizeof(float) * count); }
};

#if defined(__AVX512BF16__)

// Two bfloat16 terms a lane: vdpbf16ps. Only for bfloat16 activations.
struct Bf16Element {
  using Type = uint16_t;
  using Vector = __m512i;
  using Table = __m512i;  // the 16 values twice: vpermw reads 5 bits of an index, of which the fifth is not ours
  static constexpr int STEP = 2;
  static constexpr int64_t CHAIN = 256;
  static constexpr Dtype DTYPE = BFLOAT16;

  static Vector load_lanes(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static Vector broadcast(const uint16_t* p) {
    int pair;
    std::memcpy(&pair, p, 4);
    return _mm512_set1_epi32(pair);
  }
  static F multiply_add(Vector x, Vector w, F sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }

  static Table table(const float* code, float scale) {
    const F values = mul(load(code), splat(scale));
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(values, values));
  }
  static void decode32(const uint8_t* bytes, const Table& table, uint16_t* out) {
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(both, 4), _mm512_slli_epi32(both, 16));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
  }
  static void convert(const void* source, Dtype, int64_t index, int64_t count, uint16_t* out) {
    std::memcpy(out, static_cast<const uint16_t*>(source) + index, static_cast<size_t>(count) * 2);
  }
  struct Codes {
    F values;
  };
  static Codes codes(const float* code) { return {load(code)}; }
  // Words 0 to 15 of a vector are the first 64 weights: bit 4 of an index chooses the table.
  static void decode128(const uint8_t* bytes, const Codes& codes, float first, float second, uint16_t* out) {
    const __m512i table = scaled_pair(codes.values, first, second);
    const __m512i b = _mm512_loadu_si512(bytes);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(half_index(_mm512_srli_epi16(b, 4)), table));
    _mm512_storeu_si512(out + 32, _mm512_permutexvar_epi16(half_index(b), table));
    _mm512_storeu_si512(out + 64, _mm512_permutexvar_epi16(half_index(_mm512_srli_epi16(b, 12)), table));
    _mm512_storeu_si512(out + 96, _mm512_permutexvar_epi16(half_index(_mm512_srli_epi16(b, 8)), table));
  }
  static __m512i scaled_pair(F values, float first, float second) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(mul(values, splat(second)), mul(values, splat(first))));
  }
  // (nibble & 15) | 16 in the upper half.
  static __m512i half_index(__m512i nibbles) {
    constexpr long long ODD = 0x0010001000100010;
    return _mm512_ternarylogic_epi32(nibbles, _mm512_set1_epi16(15), _mm512_set_epi64(ODD, ODD, ODD, ODD, 0, 0, 0, 0),
                                     0xea);
  }
  static void order(uint16_t* x) {
    uint16_t natural[128];
    std::memcpy(natural, x, sizeof natural);
    for (int v = 0; v < 4; ++v)
      for (int i = 0; i < 32; ++i) x[v * 32 + i] = natural[4 * i + v];
  }
  static void interleave(const uint16_t* rows, int count, uint16_t* out) {
    const __m512i low = _mm512_setr_epi32(0x200000, 0x210001, 0x220002, 0x230003, 0x240004, 0x250005, 0x260006,
                                          0x270007, 0x280008, 0x290009, 0x2a000a, 0x2b000b, 0x2c000c, 0x2d000d,
                                          0x2e000e, 0x2f000f);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int i = 0; i < count; i += 32) {
      const __m512i a = _mm512_loadu_si512(rows + i), b = _mm512_loadu_si512(rows + count + i);
      _mm512_storeu_si512(out + 2 * i, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(out + 2 * i + 32, _mm512_permutex2var_epi16(a, high, b));
    }
  }
};

#endif

}  // namespace fourbit::FOURBIT_ISA
