// One bfloat16 or float16 to float32 and back, rounded to nearest even, the bits that torch gives.
//
// In the instruction set's own namespace, as all inline code here: the same function compiled with two sets of
// flags under one name would leave the linker to pick either, and the scalar path to run AVX512.
#pragma once

#include <cstdint>
#include <cstring>

namespace fourbit::FOURBIT_ISA {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float bf16_to_float(uint16_t half) { return bits_float(uint32_t{half} << 16); }

inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN: the rounding below could carry it to infinity
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float f16_to_float(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t rest = half & 0x7fffu;
  if (rest >= 0x7c00) return bits_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return bits_float(sign | ((rest << 13) + ((127u - 15u) << 23)));
  const float magnitude = static_cast<float>(rest) * 0x1p-24f;  // subnormal: exact in float32
  return bits_float(sign | float_bits(magnitude));
}

inline uint16_t float_to_f16(float value) {
  const uint32_t bits = float_bits(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;
  if (rest >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (rest < 0x38800000) {                       // below 2^-14: the sum rounds at 2^-24
    const float shifted = bits_float(rest) + 0.5f;
    return static_cast<uint16_t>(sign | (float_bits(shifted) - 0x3f000000));
  }
  const uint32_t rounded = rest + 0xfff + (rest >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded - ((127u - 15u) << 23)) >> 13));
}

}  // namespace fourbit::FOURBIT_ISA
