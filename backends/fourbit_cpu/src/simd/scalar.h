// The vector primitives without vectors: what the others must agree with, and for any processor.
#pragma once

#include <cmath>
#include <cstdint>

#include "simd/convert.h"

namespace fourbit::FOURBIT_ISA {

using F = float;
constexpr int W = 1;  // float32 lanes of an F

inline F zero() { return 0.0f; }
inline F splat(float value) { return value; }
inline F load(const float* p) { return *p; }
inline void store(float* p, F v) { *p = v; }
inline F add(F a, F b) { return a + b; }
inline F mul(F a, F b) { return a * b; }
inline F fma(F a, F b, F c) { return a * b + c; }
inline float sum(F v) { return v; }

inline F widen_bf16(const uint16_t* p) { return bf16_to_float(*p); }
inline F widen_f16(const uint16_t* p) { return f16_to_float(*p); }
inline void narrow_bf16(uint16_t* p, F v) { *p = float_to_bf16(v); }
inline void narrow_f16(uint16_t* p, F v) { *p = float_to_f16(v); }

inline void transpose(F (&)[W]) {}

inline void prefetch(const void* p) { __builtin_prefetch(p); }

// The 16 values of a codebook, times a scale.
struct Table {
  float values[16];
};
inline Table make_table(const float* code, float scale) {
  Table table;
  for (int i = 0; i < 16; ++i) table.values[i] = code[i] * scale;
  return table;
}
// 32 weights of 16 bytes, in order.
inline void decode32(const uint8_t* bytes, const Table& table, F* out) {
  for (int i = 0; i < 16; ++i) {
    out[2 * i] = table.values[bytes[i] >> 4];
    out[2 * i + 1] = table.values[bytes[i] & 15];
  }
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
    decode32(bytes + 16 * part, table, out);
  }
  static constexpr int element(int position) { return position; }
};
// The same with values rounded to bfloat16, where that is cheaper: for bfloat16 activations.
using Rounded = Exact;

// The tile of the matrix product: TILE_M vectors of rows of x by TILE_N rows of the weight.
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
inline constexpr int tile_n = TileM == 4 ? 2 : TileM == 3 ? 2 : TileM == 2 ? 4 : 8;
// Sums that one row of x is kept in, in few-row products.
constexpr int DOT_CHAINS = 16;
// Rows of the weight that share a load of x there.
constexpr int DOT_ROWS = 1;
constexpr int MAX_TILE_M = 4;

}  // namespace fourbit::FOURBIT_ISA
