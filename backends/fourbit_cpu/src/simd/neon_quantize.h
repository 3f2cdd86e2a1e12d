// What quantizing and dequantizing need beyond simd/neon.h.
#pragma once

#include "nearest.inl"
#include "simd/neon.h"

namespace fourbit::FOURBIT_ISA {

// The largest magnitude. As integers, so that NaN is above infinity and infinity above every number.
struct Largest {
  uint32x4_t bits = vdupq_n_u32(0);
  void add(F v) { bits = vmaxq_u32(bits, vandq_u32(vreinterpretq_u32_f32(v), vdupq_n_u32(0x7fffffff))); }
  uint32_t result() const { return vmaxvq_u32(bits); }
};

// Whether a value occurs.
struct Contains {
  F value;
  uint32x4_t found = vdupq_n_u32(0);
  explicit Contains(float v) : value(splat(v)) {}
  void add(F v) { found = vorrq_u32(found, vceqq_f32(v, value)); }
  bool result() const { return vmaxvq_u32(found) != 0; }
};

// A codebook of 16 values: a binary search in registers.
struct Encoder {
  F level_1, level_2[2];
  uint8x16_t level_3;    // 4 edges
  uint8x16x2_t level_4;  // 8 edges
  uint8x16_t codes;
};
inline Encoder make_encoder(const float* code) {
  const Edges<16> sorted = find_edges<16>(code);
  float tree[16];
  make_tree(sorted, tree);
  Encoder encoder;
  encoder.level_1 = splat(tree[1]);
  encoder.level_2[0] = splat(tree[2]);
  encoder.level_2[1] = splat(tree[3]);
  encoder.level_3 = vreinterpretq_u8_f32(load(tree + 4));
  encoder.level_4.val[0] = vreinterpretq_u8_f32(load(tree + 8));
  encoder.level_4.val[1] = vreinterpretq_u8_f32(load(tree + 12));
  encoder.codes = vld1q_u8(sorted.codes);
  return encoder;
}

// How many edges are below each value.
inline uint32x4_t edges_below(F v, const Encoder& encoder) {
  // the four bytes of entry i of a table of float32
  const auto entry = [](uint32x4_t i) {
    return vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(0x03020100), i, vdupq_n_u32(0x04040404)));
  };
  const auto next = [](uint32x4_t i, uint32x4_t above) { return vsubq_u32(vaddq_u32(i, i), above); };  // above: 0, -1
  uint32x4_t above = vcgtq_f32(v, encoder.level_1);
  uint32x4_t index = vshrq_n_u32(above, 31);
  above = vcgtq_f32(v, vbslq_f32(above, encoder.level_2[1], encoder.level_2[0]));
  index = next(index, above);
  above = vcgtq_f32(v, vreinterpretq_f32_u8(vqtbl1q_u8(encoder.level_3, entry(index))));
  index = next(index, above);
  above = vcgtq_f32(v, vreinterpretq_f32_u8(vqtbl2q_u8(encoder.level_4, entry(index))));
  return next(index, above);
}

// Codes of 16 values.
inline uint8x16_t encode16(const F* values, const Encoder& encoder) {
  uint16x4_t index[4];
  for (int i = 0; i < 4; ++i) index[i] = vmovn_u32(edges_below(values[i], encoder));
  const uint8x8_t low = vmovn_u16(vcombine_u16(index[0], index[1]));
  const uint8x8_t high = vmovn_u16(vcombine_u16(index[2], index[3]));
  return vqtbl1q_u8(encoder.codes, vcombine_u8(low, high));
}

// 64 values of at most about 1 in magnitude to 32 bytes.
inline void encode64(const F* values, const Encoder& encoder, uint8_t* out) {
  for (int group = 0; group < 2; ++group, values += 8, out += 16) {
    const uint8x16_t a = encode16(values, encoder), b = encode16(values + 4, encoder);
    vst1q_u8(out, vsliq_n_u8(vuzp2q_u8(a, b), vuzp1q_u8(a, b), 4));
  }
}

// 64 values to as many codes of a codebook of 256.
inline void search64(const F* values, const Search256& search, uint8_t* out) {
  for (int group = 0; group < 16; ++group) {
    float v[4];
    store(v, values[group]);
    for (int i = 0; i < 4; ++i) {
      unsigned p = 1;
      for (int level = 0; level < 8; ++level) p = 2 * p + (v[i] > search.tree[p]);
      out[4 * group + i] = search.codes[p - 256];
    }
  }
}

// A codebook's values times a scale, rounded to 16 bits: their low and their high bytes.
struct HalfTable {
  uint8x16_t low, high;
};
template <bool Bf16>
HalfTable make_half_table(const float* code, float scale) {
  uint16_t half[16];
  for (int i = 0; i < 16; i += 4) {
    const F scaled = mul(load(code + i), splat(scale));
    Bf16 ? narrow_bf16(half + i, scaled) : narrow_f16(half + i, scaled);
  }
  const uint8x16x2_t planes = vld2q_u8(reinterpret_cast<const uint8_t*>(half));
  return {planes.val[0], planes.val[1]};
}
// 32 weights of 16 bytes, in order.
inline void decode32(const uint8_t* bytes, const HalfTable& table, uint16_t* out) {
  const Nibbles index = nibbles32(bytes);
  for (int part = 0; part < 2; ++part) {
    const uint8x16x2_t planes = {
        {vqtbl1q_u8(table.low, index.parts[part]), vqtbl1q_u8(table.high, index.parts[part])}};
    vst2q_u8(reinterpret_cast<uint8_t*>(out + 16 * part), planes);
  }
}

}  // namespace fourbit::FOURBIT_ISA
