// linear_4bit, its gradient, and both for expert weights: which way of multiplying serves.
#pragma once

#include "dot.inl"
#include "kernels.h"
#include "product.inl"
#include "workspace.h"

namespace fourbit::FOURBIT_ISA {

// Rows of x up to which the weight is streamed past them (dot.inl). Above, it is decoded into a scratch (product.inl).
constexpr int FEW_FLOAT = 4, FEW_BF16 = 8;

// Work of about 30 microseconds and less is done before another thread has come to help.
inline bool small(int64_t m, int64_t n, int64_t k) { return n * k * (8 + m) < (int64_t{1} << 22); }

// x as panels, for `product(panels)`; what that returns, or the bytes that there was no memory for.
template <typename E, typename Product>
int64_t with_panels(const void* x, Dtype dtype, int64_t m, int64_t reduced, bool ordered, bool serial,
                    Product product) {
  const int64_t bytes = Panels<E>::bytes(m, reduced);
  void* data = workspace(PANELS, bytes);
  if (data == nullptr) return bytes;
  Panels<E> panels{static_cast<typename E::Type*>(data), m, round_up(reduced, GROUP), ordered};
  panels.fill(x, dtype, reduced, serial);
  return product(panels);
}

// y [m, n] = x [m, k] times the transposed [n, k] that begins at element `origin` of the weight.
inline int64_t linear_at(const void* x, Dtype dtype, int64_t m, int64_t n, int64_t k, const Weight& weight,
                         int64_t origin, const void* bias, void* out) {
  const bool serial = small(m, n, k), whole = origin % 64 == 0 && k % 64 == 0;
  const bool ordered = origin % 64 == 0 && k % GROUP == 0 && weight.blocksize >= 64;
  const auto product = [&](const auto& panels) {
    return forward_product(panels, weight, origin, n, k, bias, dtype, out, serial);
  };
#if defined(__AVX512BF16__)
  if (dtype == BFLOAT16) {
    if (whole && m <= FEW_BF16)
      return dispatch_rows<FEW_BF16, Bf16Dot>(m, x, dtype, n, k, weight, origin, bias, out, serial);
    return with_panels<Bf16Element>(x, dtype, m, k, ordered, serial, product);
  }
#endif
  if (whole && m <= FEW_FLOAT) {
    if (dtype == BFLOAT16)
      return dispatch_rows<FEW_FLOAT, RoundedDot>(m, x, dtype, n, k, weight, origin, bias, out, serial);
    return dispatch_rows<FEW_FLOAT, ExactDot>(m, x, dtype, n, k, weight, origin, bias, out, serial);
  }
  return with_panels<FloatElement>(x, dtype, m, k, ordered, serial, product);
}

// out [m, k] = grad [m, n] times the [n, k] that begins at element `origin` of the weight.
inline int64_t gradient_at(const void* grad, Dtype dtype, int64_t m, int64_t n, int64_t k, const Weight& weight,
                           int64_t origin, void* out) {
  const bool serial = small(m, n, k);
  const auto product = [&]<typename E>(const Panels<E>& panels) {
    return GradientProduct<E>::run(panels, weight, origin, n, k, dtype, out, serial);
  };
#if defined(__AVX512BF16__)
  if (dtype == BFLOAT16) return with_panels<Bf16Element>(grad, dtype, m, n, false, serial, product);
#endif
  return with_panels<FloatElement>(grad, dtype, m, n, false, serial, product);
}

int64_t linear_4bit(const void* x, Dtype dtype, int64_t m, int64_t n, int64_t k, const Weight& weight,
                    const void* bias, void* out) {
  const int64_t missing = linear_at(x, dtype, m, n, k, weight, 0, bias, out);
  trim_workspace(PANELS);
  return missing;
}

int64_t linear_4bit_grad(const void* grad, Dtype dtype, int64_t m, int64_t n, int64_t k, const Weight& weight,
                         void* out) {
  const int64_t missing = gradient_at(grad, dtype, m, n, k, weight, 0, out);
  trim_workspace(PANELS);
  return missing;
}

// Each expert's rows of x with that expert's weight; rows of no expert give zeros.
template <bool Gradient>
int64_t each_expert(const void* x, Dtype dtype, int64_t rows, const int64_t* ends, int64_t experts, int64_t n,
                    int64_t k, const Weight& weight, void* out) {
  const int64_t size = size_of(dtype), in = Gradient ? n : k, width = Gradient ? k : n;
  int64_t begin = 0, missing = 0;
  for (int64_t expert = 0; expert < experts && missing == 0; ++expert) {
    const int64_t end = ends[expert];
    if (end <= begin) continue;
    const char* source = static_cast<const char*>(x) + begin * in * size;
    char* target = static_cast<char*>(out) + begin * width * size;
    if constexpr (Gradient)
      missing = gradient_at(source, dtype, end - begin, n, k, weight, expert * n * k, target);
    else
      missing = linear_at(source, dtype, end - begin, n, k, weight, expert * n * k, nullptr, target);
    begin = end;
  }
  std::memset(static_cast<char*>(out) + begin * width * size, 0, static_cast<size_t>((rows - begin) * width * size));
  trim_workspace(PANELS);
  return missing;
}

int64_t grouped_linear_4bit(const void* x, Dtype dtype, int64_t rows, const int64_t* ends, int64_t experts, int64_t n,
                            int64_t k, const Weight& weight, void* out) {
  return each_expert<false>(x, dtype, rows, ends, experts, n, k, weight, out);
}

int64_t grouped_linear_4bit_grad(const void* grad, Dtype dtype, int64_t rows, const int64_t* ends, int64_t experts,
                                 int64_t n, int64_t k, const Weight& weight, void* out) {
  return each_expert<true>(grad, dtype, rows, ends, experts, n, k, weight, out);
}

}  // namespace fourbit::FOURBIT_ISA
