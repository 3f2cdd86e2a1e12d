// Memory of each dtype as vectors of float32.
#pragma once

#include "kernels.h"

namespace fourbit::FOURBIT_ISA {

template <Dtype D>
struct Values {
  using Type = uint16_t;
  static F load(const Type* p) { return D == BFLOAT16 ? widen_bf16(p) : widen_f16(p); }
  static void store(Type* p, F v) { D == BFLOAT16 ? narrow_bf16(p, v) : narrow_f16(p, v); }
  static float get(const Type* p) { return D == BFLOAT16 ? bf16_to_float(*p) : f16_to_float(*p); }
  static void put(Type* p, float v) { *p = D == BFLOAT16 ? float_to_bf16(v) : float_to_f16(v); }
};

template <>
struct Values<FLOAT32> {
  using Type = float;
  static F load(const float* p) { return FOURBIT_ISA::load(p); }
  static void store(float* p, F v) { FOURBIT_ISA::store(p, v); }
  static float get(const float* p) { return *p; }
  static void put(float* p, float v) { *p = v; }
};

}  // namespace fourbit::FOURBIT_ISA
