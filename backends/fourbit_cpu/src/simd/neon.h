// The vector primitives in 64-bit ARM's NEON.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "simd/convert.h"

namespace fourbit::FOURBIT_ISA {

using F = float32x4_t;
constexpr int W = 4;

inline F zero() { return vdupq_n_f32(0.0f); }
inline F splat(float value) { return vdupq_n_f32(value); }
inline F load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, F v) { vst1q_f32(p, v); }
inline F add(F a, F b) { return vaddq_f32(a, b); }
inline F mul(F a, F b) { return vmulq_f32(a, b); }
inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
inline float sum(F v) { return vaddvq_f32(v); }

inline F widen_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline F widen_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline void narrow_bf16(uint16_t* p, F v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t sum = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
  const uint32x4_t number = vceqq_f32(v, v);
  vst1_u16(p, vshrn_n_u32(vbslq_u32(number, sum, vdupq_n_u32(0x7fc00000)), 16));
}
inline void narrow_f16(uint16_t* p, F v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }

// The W x W block of its rows, turned.
inline void transpose(F (&r)[W]) {
  const F a = vtrn1q_f32(r[0], r[1]), b = vtrn2q_f32(r[0], r[1]);
  const F c = vtrn1q_f32(r[2], r[3]), d = vtrn2q_f32(r[2], r[3]);
  r[0] = vcombine_f32(vget_low_f32(a), vget_low_f32(c));
  r[1] = vcombine_f32(vget_low_f32(b), vget_low_f32(d));
  r[2] = vcombine_f32(vget_high_f32(a), vget_high_f32(c));
  r[3] = vcombine_f32(vget_high_f32(b), vget_high_f32(d));
}

inline void prefetch(const void* p) { __builtin_prefetch(p); }

// The values' bytes: plane b has byte b of each of the 16, for tbl.
struct Table {
  uint8x16_t planes[4];
};
inline Table make_table(const float* code, float scale) {
  float scaled[16];
  for (int i = 0; i < 16; i += 4) store(scaled + i, mul(load(code + i), splat(scale)));
  const uint8x16x4_t planes = vld4q_u8(reinterpret_cast<const uint8_t*>(scaled));
  return {{planes.val[0], planes.val[1], planes.val[2], planes.val[3]}};
}

struct Nibbles {
  uint8x16_t parts[2];
};
// 16 bytes as 32 nibbles, in order.
inline __attribute__((always_inline)) Nibbles nibbles32(const uint8_t* bytes) {
  const uint8x16_t b = vld1q_u8(bytes);
  const uint8x16_t high = vshrq_n_u8(b, 4), low = vandq_u8(b, vdupq_n_u8(15));
  return {{vzip1q_u8(high, low), vzip2q_u8(high, low)}};
}

inline void decode32(const uint8_t* bytes, const Table& table, F* out) {
  const Nibbles index = nibbles32(bytes);
  for (int part = 0; part < 2; ++part) {
    uint8x16_t p[4];
    for (int b = 0; b < 4; ++b) p[b] = vqtbl1q_u8(table.planes[b], index.parts[part]);
    const uint16x8_t low0 = vreinterpretq_u16_u8(vzip1q_u8(p[0], p[1]));
    const uint16x8_t low1 = vreinterpretq_u16_u8(vzip2q_u8(p[0], p[1]));
    const uint16x8_t high0 = vreinterpretq_u16_u8(vzip1q_u8(p[2], p[3]));
    const uint16x8_t high1 = vreinterpretq_u16_u8(vzip2q_u8(p[2], p[3]));
    out[4 * part] = vreinterpretq_f32_u16(vzip1q_u16(low0, high0));
    out[4 * part + 1] = vreinterpretq_f32_u16(vzip2q_u16(low0, high0));
    out[4 * part + 2] = vreinterpretq_f32_u16(vzip1q_u16(low1, high1));
    out[4 * part + 3] = vreinterpretq_f32_u16(vzip2q_u16(low1, high1));
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

// Values rounded to bfloat16 have two bytes: half the lookups.
struct Rounded {
  static constexpr int VECTORS = 128 / W;
  struct Table {
    uint8x16_t low, high;
  };
  static Table table(const float* code) {
    float rounded[16];
    for (int i = 0; i < 16; ++i) rounded[i] = bf16_to_float(float_to_bf16(code[i]));
    const FOURBIT_ISA::Table exact = make_table(rounded, 1.0f);
    return {exact.planes[2], exact.planes[3]};
  }
  static inline __attribute__((always_inline)) void decode_part(const uint8_t* bytes, int part, const Table& table,
                                                               F* out) {
    const Nibbles index = nibbles32(bytes + 16 * part);
    for (int half = 0; half < 2; ++half, out += 4) {
      const uint8x16_t low = vqtbl1q_u8(table.low, index.parts[half]);
      const uint8x16_t high = vqtbl1q_u8(table.high, index.parts[half]);
      const uint16x8_t a = vreinterpretq_u16_u8(vzip1q_u8(low, high));
      const uint16x8_t b = vreinterpretq_u16_u8(vzip2q_u8(low, high));
      out[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(a), 16));
      out[1] = vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(a), 16));
      out[2] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(b), 16));
      out[3] = vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(b), 16));
    }
  }
  static constexpr int element(int position) { return position; }
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
inline constexpr int tile_n = TileM == 4 ? 6 : TileM == 3 ? 8 : TileM == 2 ? 12 : 24;
// Sums that one row of x is kept in, in few-row products.
constexpr int DOT_CHAINS = 4;
// Rows of the weight that share a load of x there.
constexpr int DOT_ROWS = 1;
constexpr int MAX_TILE_M = 4;

}  // namespace fourbit::FOURBIT_ISA
