// Scales as float32, whichever way they are stored.
#pragma once

#include "kernels.h"

namespace fourbit::FOURBIT_ISA {

inline float scale_at(const Weight& weight, int64_t block) {
  if (weight.nested_absmax == nullptr) return static_cast<const float*>(weight.absmax)[block];
  const float product = weight.nested_code[static_cast<const uint8_t*>(weight.absmax)[block]] *
                        weight.nested_absmax[block / 256];  // -ffp-contract=off: rounded before the sum
  return product + *weight.nested_offset;
}

// Scales first to first + count - 1: in place where they are float32, else decoded into `buffer`.
inline const float* scales_of(const Weight& weight, int64_t first, int64_t count, float* buffer) {
  if (weight.nested_absmax == nullptr) return static_cast<const float*>(weight.absmax) + first;
  const uint8_t* codes = static_cast<const uint8_t*>(weight.absmax);
  const float offset = *weight.nested_offset;
  for (int64_t i = first; i < first + count;) {
    const int64_t end = (i / 256 + 1) * 256 < first + count ? (i / 256 + 1) * 256 : first + count;
    const float nested = weight.nested_absmax[i / 256];
    for (; i < end; ++i) {
      const float product = weight.nested_code[codes[i]] * nested;
      buffer[i - first] = product + offset;
    }
  }
  return buffer;
}

}  // namespace fourbit::FOURBIT_ISA
