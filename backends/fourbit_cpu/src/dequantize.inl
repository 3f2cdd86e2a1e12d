// dequantize_4bit, any part of it, and dequantize_blockwise.
#pragma once

#include <cstring>

#include "kernels.h"
#include "parallel.h"
#include "scales.inl"
#include "values.inl"

namespace fourbit::FOURBIT_ISA {

constexpr int64_t DEQUANTIZE_TASK = 1 << 16;  // elements: whole blocks, 128 or 256 KB of output

// Decodes packed bytes with one block's scale into dtype D.
template <Dtype D>
struct Decoder {
  HalfTable table;
  Decoder(const float* code, float scale) : table(make_half_table<D == BFLOAT16>(code, scale)) {}
  void decode(const uint8_t* bytes, uint16_t* out) const { decode32(bytes, table, out); }
};
template <>
struct Decoder<FLOAT32> {
  Table table;
  Decoder(const float* code, float scale) : table(make_table(code, scale)) {}
  void decode(const uint8_t* bytes, float* out) const {
    F values[32 / W];
    decode32(bytes, table, values);
    for (int i = 0; i < 32 / W; ++i) store(out + i * W, values[i]);
  }
};

// Elements start to end of one block.
template <Dtype D>
inline void dequantize_part(const uint8_t* packed, int64_t start, int64_t end, const float* code, float scale,
                            typename Values<D>::Type* out) {
  if (start % 2 != 0) {
    Values<D>::put(out++, code[packed[start / 2] & 15] * scale);
    if (++start == end) return;
  }
  const Decoder<D> decoder(code, scale);
  const uint8_t* bytes = packed + start / 2;
  int64_t count = end - start;
  for (; count >= 32; count -= 32, bytes += 16, out += 32) decoder.decode(bytes, out);
  if (count == 0) return;
  uint8_t rest[16] = {};
  typename Values<D>::Type values[32];
  std::memcpy(rest, bytes, static_cast<size_t>(count + 1) / 2);
  decoder.decode(rest, values);
  std::memcpy(out, values, static_cast<size_t>(count) * sizeof *values);
}

template <Dtype D>
void dequantize_range_as(const Weight& weight, int64_t start, int64_t count, void* target) {
  constexpr int64_t group = 256;  // scales decoded at a time
  auto* out = static_cast<typename Values<D>::Type*>(target);
  const int64_t end = start + count, blocksize = weight.blocksize;
  const int shift = __builtin_ctzll(static_cast<unsigned long long>(blocksize));
  float buffer[group];
  while (start < end) {
    const int64_t first = start >> shift, needed = ((end - 1) >> shift) + 1 - first;
    const int64_t blocks = needed < group ? needed : group;
    const float* scales = scales_of(weight, first, blocks, buffer);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t last = (first + i + 1) << shift, stop = last < end ? last : end;
      dequantize_part<D>(weight.packed, start, stop, weight.code, scales[i], out);
      out += stop - start;
      start = stop;
    }
  }
}

// Elements start to start + count - 1, whatever the start: beginning with the lower nibble of a byte where it is
// odd. On the calling thread.
inline void dequantize_range(const Weight& weight, int64_t start, int64_t count, Dtype dtype, void* out) {
  const auto dequantize = dtype == FLOAT32    ? dequantize_range_as<FLOAT32>
                          : dtype == BFLOAT16 ? dequantize_range_as<BFLOAT16>
                                              : dequantize_range_as<FLOAT16>;
  dequantize(weight, start, count, out);
}

void dequantize_4bit(const Weight& weight, int64_t count, Dtype dtype, void* out) {
  auto task = [&](int64_t index) {
    const int64_t first = index * DEQUANTIZE_TASK;
    const int64_t part = count - first < DEQUANTIZE_TASK ? count - first : DEQUANTIZE_TASK;
    dequantize_range(weight, first, part, dtype, static_cast<char*>(out) + first * size_of(dtype));
  };
  parallel((count + DEQUANTIZE_TASK - 1) / DEQUANTIZE_TASK, count <= 2 * DEQUANTIZE_TASK, task);
}

template <Dtype D>
void dequantize_block(const uint8_t* codes, int64_t count, const float* code, float scale, void* target, int64_t at) {
  auto* out = static_cast<typename Values<D>::Type*>(target) + at;
  const F factor = splat(scale);
  for (; count > 0; count -= 32, codes += 32, out += 32) {
    const int64_t part = count < 32 ? count : 32;
    float values[32] = {};
    typename Values<D>::Type rounded[32];
    for (int64_t i = 0; i < part; ++i) values[i] = code[codes[i]];
    for (int i = 0; i < 32; i += W) Values<D>::store(rounded + i, mul(load(values + i), factor));
    std::memcpy(out, rounded, static_cast<size_t>(part) * sizeof *rounded);
  }
}

void dequantize_blockwise(const uint8_t* codes, const float* absmax, int64_t count, const float* code,
                          int64_t blocksize, Dtype dtype, void* out) {
  const auto dequantize = dtype == FLOAT32    ? dequantize_block<FLOAT32>
                          : dtype == BFLOAT16 ? dequantize_block<BFLOAT16>
                                              : dequantize_block<FLOAT16>;
  auto task = [&](int64_t index) {
    const int64_t end = count - index * DEQUANTIZE_TASK < DEQUANTIZE_TASK ? count : (index + 1) * DEQUANTIZE_TASK;
    for (int64_t i = index * DEQUANTIZE_TASK; i < end; i += blocksize) {
      const int64_t block = blocksize < end - i ? blocksize : end - i;
      dequantize(codes + i, block, code, absmax[i / blocksize], out, i);
    }
  };
  parallel((count + DEQUANTIZE_TASK - 1) / DEQUANTIZE_TASK, count <= DEQUANTIZE_TASK, task);
}

}  // namespace fourbit::FOURBIT_ISA
