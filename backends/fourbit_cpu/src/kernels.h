// The kernels' interface: plain C types, no torch, no Python. One table of functions per instruction set.
#pragma once

#include <cstdint>

namespace fourbit {

enum Dtype : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

inline constexpr int64_t size_of(Dtype dtype) { return dtype == FLOAT32 ? 4 : 2; }

// A 4-bit weight, row-major: element 2i in the high nibble of byte i, one scale for each `blocksize` elements.
// With `nested_absmax` the scales are bytes, and scale i is
// nested_code[absmax[i]] * nested_absmax[i / 256] + nested_offset, the product rounded before the sum.
struct Weight {
  const uint8_t* packed;
  const void* absmax;
  const float* code;  // 16
  int64_t blocksize;  // a power of two, 32 to 4096
  const float* nested_absmax;
  const float* nested_code;    // 256
  const float* nested_offset;  // 1
};

// What each function does is said in core/fourbit/backend.py; here only how the arguments are laid out. All sizes have
// been checked. Pointers have the alignment of their type and no more. Each computes in the default floating-point
// environment (float_environment.h). The linear ones return 0, or how many bytes of scratch memory the system did not
// have: `out` is then unfinished.
struct Kernels {
  const char* name;

  // w [count] -> packed [(count + 1) / 2], absmax [ceil(count / blocksize)]
  void (*quantize_4bit)(const void* w, Dtype dtype, int64_t count, const float* code, int64_t blocksize,
                        bool signed_scale, uint8_t* packed, float* absmax);
  // -> out [count]
  void (*dequantize_4bit)(const Weight& weight, int64_t count, Dtype dtype, void* out);
  // x [count] -> codes [count], absmax [ceil(count / blocksize)]; code [256]
  void (*quantize_blockwise)(const void* x, Dtype dtype, int64_t count, const float* code, int64_t blocksize,
                             uint8_t* codes, float* absmax);
  void (*dequantize_blockwise)(const uint8_t* codes, const float* absmax, int64_t count, const float* code,
                               int64_t blocksize, Dtype dtype, void* out);
  // ids [count] (8 or 4 bytes each) -> out [count, dim]; the position of the first bad id, or -1
  int64_t (*embedding_4bit)(const void* ids, int id_bytes, int64_t count, int64_t rows, int64_t dim,
                            const Weight& weight, Dtype dtype, void* out);
  // x [m, k], weight [n, k], bias [n] or null, x's dtype -> out [m, n]
  int64_t (*linear_4bit)(const void* x, Dtype dtype, int64_t m, int64_t n, int64_t k, const Weight& weight,
                         const void* bias, void* out);
  // grad [m, n], weight [n, k] -> out [m, k]
  int64_t (*linear_4bit_grad)(const void* grad, Dtype dtype, int64_t m, int64_t n, int64_t k, const Weight& weight,
                              void* out);
  // x [rows, k], weight [experts, n, k], ends [experts] (ascending, at most rows) -> out [rows, n]
  int64_t (*grouped_linear_4bit)(const void* x, Dtype dtype, int64_t rows, const int64_t* ends, int64_t experts,
                                 int64_t n, int64_t k, const Weight& weight, void* out);
  // grad [rows, n] -> out [rows, k]
  int64_t (*grouped_linear_4bit_grad)(const void* grad, Dtype dtype, int64_t rows, const int64_t* ends,
                                      int64_t experts, int64_t n, int64_t k, const Weight& weight, void* out);
};

// Defined in isa/*.cpp; which of them are compiled in depends on the architecture (CMakeLists.txt).
extern const Kernels kernels_scalar, kernels_avx2, kernels_avx512, kernels_avx512_bf16, kernels_neon;

// The instruction sets compiled in that this processor has, the best first; null-terminated.
const Kernels* const* available_kernels();

}  // namespace fourbit
