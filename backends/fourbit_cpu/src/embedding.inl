// embedding_4bit: rows of the weight by number.
#pragma once

#include <cstring>

#include "dequantize.inl"
#include "kernels.h"
#include "parallel.h"

namespace fourbit::FOURBIT_ISA {

inline int64_t id_at(const void* ids, int id_bytes, int64_t index) {
  if (id_bytes == 8) return static_cast<const int64_t*>(ids)[index];
  return static_cast<const int32_t*>(ids)[index];
}

int64_t embedding_4bit(const void* ids, int id_bytes, int64_t count, int64_t rows, int64_t dim, const Weight& weight,
                       Dtype dtype, void* out) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = id_at(ids, id_bytes, i);
    if (id < 0 || id >= rows) return i;
  }
  const int64_t fitting = (DEQUANTIZE_TASK + dim - 1) / dim;  // rows of about one task of dequantize_4bit
  const int64_t bytes = dim * size_of(dtype);
  auto task = [&](int64_t index) {
    const int64_t end = (index + 1) * fitting < count ? (index + 1) * fitting : count;
    for (int64_t i = index * fitting; i < end; ++i)
      dequantize_range(weight, id_at(ids, id_bytes, i) * dim, dim, dtype, static_cast<char*>(out) + i * bytes);
  };
  parallel((count + fitting - 1) / fitting, count * dim <= 2 * DEQUANTIZE_TASK, task);
  return -1;
}

}  // namespace fourbit::FOURBIT_ISA
