// What quantizing and dequantizing need beyond simd/scalar.h.
#pragma once

#include "nearest.inl"
#include "simd/scalar.h"

namespace fourbit::FOURBIT_ISA {

// The largest magnitude. As integers, so that NaN is above infinity and infinity above every number.
struct Largest {
  uint32_t bits = 0;
  void add(F v) {
    const uint32_t magnitude = float_bits(v) & 0x7fffffff;
    bits = magnitude > bits ? magnitude : bits;
  }
  uint32_t result() const { return bits; }
};

// Whether a value occurs.
struct Contains {
  F value;
  bool found = false;
  explicit Contains(float v) : value(v) {}
  void add(F v) { found |= v == value; }
  bool result() const { return found; }
};

// A codebook of 16 values.
struct Encoder {
  float tree[16];
  uint8_t codes[16];
};
inline Encoder make_encoder(const float* code) {
  const Edges<16> sorted = find_edges<16>(code);
  Encoder encoder;
  make_tree(sorted, encoder.tree);
  for (int i = 0; i < 16; ++i) encoder.codes[i] = sorted.codes[i];
  return encoder;
}
inline unsigned encode(float v, const Encoder& encoder) {
  unsigned p = 1;
  for (int level = 0; level < 4; ++level) p = 2 * p + (v > encoder.tree[p]);
  return encoder.codes[p - 16];
}

// 64 values of at most about 1 in magnitude to 32 bytes.
inline void encode64(const F* values, const Encoder& encoder, uint8_t* out) {
  for (int i = 0; i < 32; ++i)
    out[i] = static_cast<uint8_t>(encode(values[2 * i], encoder) << 4 | encode(values[2 * i + 1], encoder));
}

// 64 values to as many codes of a codebook of 256.
inline void search64(const F* values, const Search256& search, uint8_t* out) {
  for (int i = 0; i < 64; ++i) {
    unsigned p = 1;
    for (int level = 0; level < 8; ++level) p = 2 * p + (values[i] > search.tree[p]);
    out[i] = search.codes[p - 256];
  }
}

// A codebook's values times a scale, rounded to 16 bits.
struct HalfTable {
  uint16_t values[16];
};
template <bool Bf16>
HalfTable make_half_table(const float* code, float scale) {
  HalfTable table;
  for (int i = 0; i < 16; ++i) table.values[i] = Bf16 ? float_to_bf16(code[i] * scale) : float_to_f16(code[i] * scale);
  return table;
}
// 32 weights of 16 bytes, in order.
inline void decode32(const uint8_t* bytes, const HalfTable& table, uint16_t* out) {
  for (int i = 0; i < 16; ++i) {
    out[2 * i] = table.values[bytes[i] >> 4];
    out[2 * i + 1] = table.values[bytes[i] & 15];
  }
}

}  // namespace fourbit::FOURBIT_ISA
