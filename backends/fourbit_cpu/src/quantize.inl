// quantize_4bit and quantize_blockwise.
#pragma once

#include <cstring>

#include "kernels.h"
#include "parallel.h"
#include "values.inl"

namespace fourbit::FOURBIT_ISA {

constexpr int64_t MAX_BLOCKSIZE = 4096;
constexpr int64_t STAGE = 4096;  // elements: whole blocks that the first-level cache holds
constexpr int64_t QUANTIZE_TASK = 1 << 16;  // elements: whole blocks, 256 KB of float32

// What a block's elements are multiplied with or, where its reciprocal would overflow, divided by.
struct Scale {
  float absmax;  // as it is stored: NaN for a block with NaN or Inf, with the sign of the largest if asked for
  float inverse;
  bool ordinary;  // `inverse` is the reciprocal. Else the block is zero, not finite, or below 2^-126
};

inline bool is_ordinary(uint32_t bits) { return bits >= 0x00800000 && bits < 0x7f800000; }

// Of the bits of the largest magnitude. `negative`: no positive element reaches it.
inline Scale scale_of(uint32_t bits, bool negative) {
  if (bits >= 0x7f800000) return {__builtin_nanf(""), 0.0f, false};
  const float absmax = bits_float(negative && bits != 0 ? bits | 0x80000000 : bits);
  return {absmax, 1.0f / absmax, is_ordinary(bits)};
}

// The largest magnitude's bits of a whole block: `count` is a multiple of 32.
template <Dtype D>
inline uint32_t largest_of(const typename Values<D>::Type* w, int64_t count) {
  Largest largest;
  for (int64_t i = 0; i < count; i += 32) {
    for (int j = 0; j < 32; j += W) largest.add(Values<D>::load(w + i + j));
  }
  return largest.result();
}

// Whether no element of a whole block is positive and of the largest magnitude.
template <Dtype D>
inline bool is_negative(const typename Values<D>::Type* w, int64_t count, uint32_t bits) {
  Contains positive(bits_float(bits));
  for (int64_t i = 0; i < count; i += W) positive.add(Values<D>::load(w + i));
  return !positive.result();
}

// Of a short block.
template <Dtype D>
Scale find_scale_short(const typename Values<D>::Type* w, int64_t count, bool signed_scale) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = float_bits(Values<D>::get(w + i)) & 0x7fffffff;
    if (magnitude > bits) bits = magnitude;
  }
  bool positive = !signed_scale;
  for (int64_t i = 0; i < count && !positive; ++i) positive = float_bits(Values<D>::get(w + i)) == bits;
  return scale_of(bits, !positive);
}

// Any block of at most MAX_BLOCKSIZE elements, normalized into `out` and filled up with zeros to a multiple of 64.
template <Dtype D>
void normalize_any(const typename Values<D>::Type* w, int64_t count, const Scale& scale, float* out) {
  const bool zero = scale.absmax == 0.0f || scale.absmax != scale.absmax;
  for (int64_t i = 0; i < count; ++i) {
    const float value = Values<D>::get(w + i);
    out[i] = scale.ordinary ? value * scale.inverse : zero ? 0.0f : value / scale.absmax;
  }
  for (int64_t i = count; i % 64 != 0; ++i) out[i] = 0.0f;
}

// Any block, at any speed. An odd count is padded with the code of zero.
template <Dtype D>
void quantize_any(const typename Values<D>::Type* w, int64_t count, const Scale& scale, const Encoder& encoder,
                  uint8_t* out) {
  float normalized[MAX_BLOCKSIZE];
  normalize_any<D>(w, count, scale, normalized);
  const int64_t bytes = (count + 1) / 2;
  for (int64_t i = 0; i < bytes; i += 32) {
    F values[64 / W];
    for (int j = 0; j < 64 / W; ++j) values[j] = load(normalized + 2 * i + j * W);
    uint8_t packed[32];
    encode64(values, encoder, packed);
    std::memcpy(out + i, packed, static_cast<size_t>(bytes - i < 32 ? bytes - i : 32));
  }
}

// 64 elements, the first 32 times `low`, the others times `high`.
template <Dtype D>
inline void quantize64(const typename Values<D>::Type* w, F low, F high, const Encoder& encoder, uint8_t* out) {
  F values[64 / W];
  for (int i = 0; i < 64 / W; ++i) values[i] = mul(Values<D>::load(w + i * W), i < 32 / W ? low : high);
  encode64(values, encoder, out);
}

// Elements of whole blocks, at most STAGE: first all scales, which so overlap, then all codes from the cache.
template <Dtype D>
void quantize_stage(const typename Values<D>::Type* w, int64_t count, int64_t blocksize, bool signed_scale,
                    const Encoder& encoder, uint8_t* packed, float* absmax) {
  constexpr int64_t most = STAGE / 32;
  uint32_t bits[most];
  float inverse[most];
  const int64_t blocks = count / blocksize;
  for (int64_t b = 0; b < blocks; ++b) bits[b] = largest_of<D>(w + b * blocksize, blocksize);
  int all_ordinary = 1;
  for (int64_t b = 0; b < blocks; ++b) {
    all_ordinary &= is_ordinary(bits[b]);
    absmax[b] = bits_float(bits[b]);
    inverse[b] = 1.0f / absmax[b];
  }
  if (__builtin_expect(signed_scale || !all_ordinary, 0)) {
    for (int64_t b = 0; b < blocks; ++b) {
      const bool negative = signed_scale && is_negative<D>(w + b * blocksize, blocksize, bits[b]);
      const Scale scale = scale_of(bits[b], negative);
      absmax[b] = scale.absmax;
      inverse[b] = scale.inverse;
    }
  }
  const int64_t unit = blocksize < 64 ? 64 : blocksize, next = blocksize < 64 ? 1 : 0;
  for (int64_t i = 0, b = 0; i < count; i += unit, b += 1 + next) {
    if (!all_ordinary && !(is_ordinary(bits[b]) && is_ordinary(bits[b + next]))) {
      for (int64_t j = b; j <= b + next; ++j) {
        const Scale scale = {absmax[j], inverse[j], is_ordinary(bits[j])};
        quantize_any<D>(w + j * blocksize, blocksize, scale, encoder, packed + j * blocksize / 2);
      }
      continue;
    }
    const F low = splat(inverse[b]), high = splat(inverse[b + next]);
    for (int64_t j = i; j < i + unit; j += 64) {
      for (int line = 0; line < 64; line += 64 / static_cast<int>(sizeof *w)) prefetch(w + STAGE + j + line);
      quantize64<D>(w + j, low, high, encoder, packed + j / 2);
    }
  }
}

// Elements `first` to `end`: whole blocks, but for the last of all.
template <Dtype D>
void quantize_range(const typename Values<D>::Type* w, int64_t first, int64_t end, int64_t blocksize,
                    bool signed_scale, const Encoder& encoder, uint8_t* packed, float* absmax) {
  const int64_t unit = blocksize < 64 ? 64 : blocksize;
  int64_t i = first;
  while (end - i >= unit) {
    const int64_t count = end - i < STAGE ? (end - i) / unit * unit : STAGE;
    quantize_stage<D>(w + i, count, blocksize, signed_scale, encoder, packed + i / 2, absmax + i / blocksize);
    i += count;
  }
  for (; i < end; i += blocksize) {
    const int64_t count = blocksize < end - i ? blocksize : end - i;
    const Scale scale = find_scale_short<D>(w + i, count, signed_scale);
    absmax[i / blocksize] = scale.absmax;
    quantize_any<D>(w + i, count, scale, encoder, packed + i / 2);
  }
}

template <Dtype D>
void quantize_as(const void* w, int64_t count, const float* code, int64_t blocksize, bool signed_scale,
                 uint8_t* packed, float* absmax) {
  const auto* values = static_cast<const typename Values<D>::Type*>(w);
  const Encoder encoder = make_encoder(code);
  auto task = [&](int64_t index) {
    const int64_t first = index * QUANTIZE_TASK;
    const int64_t end = count - first < QUANTIZE_TASK ? count : first + QUANTIZE_TASK;
    quantize_range<D>(values, first, end, blocksize, signed_scale, encoder, packed, absmax);
  };
  parallel((count + QUANTIZE_TASK - 1) / QUANTIZE_TASK, count <= 2 * QUANTIZE_TASK, task);
}

void quantize_4bit(const void* w, Dtype dtype, int64_t count, const float* code, int64_t blocksize,
                   bool signed_scale, uint8_t* packed, float* absmax) {
  const auto quantize = dtype == FLOAT32    ? quantize_as<FLOAT32>
                        : dtype == BFLOAT16 ? quantize_as<BFLOAT16>
                                            : quantize_as<FLOAT16>;
  quantize(w, count, code, blocksize, signed_scale, packed, absmax);
}

// One block of quantize_blockwise.
template <Dtype D>
void quantize_block(const typename Values<D>::Type* x, int64_t count, int64_t blocksize, const Search256& search,
                    uint8_t* codes, float* absmax) {
  const bool whole = count == blocksize;
  const Scale scale = whole ? scale_of(largest_of<D>(x, count), false) : find_scale_short<D>(x, count, false);
  *absmax = scale.absmax;
  int64_t i = 0;
  if (scale.ordinary) {
    for (const F inverse = splat(scale.inverse); i + 64 <= count; i += 64) {
      F values[64 / W];
      for (int j = 0; j < 64 / W; ++j) values[j] = mul(Values<D>::load(x + i + j * W), inverse);
      search64(values, search, codes + i);
    }
    if (i == count) return;
  }
  float normalized[MAX_BLOCKSIZE];
  normalize_any<D>(x + i, count - i, scale, normalized);
  for (const float* part = normalized; i < count; i += 64, part += 64) {
    F values[64 / W];
    for (int j = 0; j < 64 / W; ++j) values[j] = load(part + j * W);
    uint8_t found[64];
    search64(values, search, found);
    std::memcpy(codes + i, found, static_cast<size_t>(count - i < 64 ? count - i : 64));
  }
}

template <Dtype D>
void quantize_blockwise_as(const void* x, int64_t count, const float* code, int64_t blocksize, uint8_t* codes,
                           float* absmax) {
  const auto* values = static_cast<const typename Values<D>::Type*>(x);
  const Search256 search = make_search256(code);
  constexpr int64_t size = 1 << 14;  // elements a task
  auto task = [&](int64_t index) {
    const int64_t end = count - index * size < size ? count : (index + 1) * size;
    for (int64_t i = index * size; i < end; i += blocksize) {
      const int64_t block = blocksize < end - i ? blocksize : end - i;
      quantize_block<D>(values + i, block, blocksize, search, codes + i, absmax + i / blocksize);
    }
  };
  parallel((count + size - 1) / size, count <= size, task);
}

void quantize_blockwise(const void* x, Dtype dtype, int64_t count, const float* code, int64_t blocksize,
                        uint8_t* codes, float* absmax) {
  const auto quantize = dtype == FLOAT32    ? quantize_blockwise_as<FLOAT32>
                        : dtype == BFLOAT16 ? quantize_blockwise_as<BFLOAT16>
                                            : quantize_blockwise_as<FLOAT16>;
  quantize(x, count, code, blocksize, codes, absmax);
}

}  // namespace fourbit::FOURBIT_ISA
