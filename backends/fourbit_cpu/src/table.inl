// Included by each isa/*.cpp after its simd header: all kernels, compiled for that instruction set.
#include "float_environment.h"
#include "kernels.h"
#include "scales.inl"
#include "quantize.inl"
#include "dequantize.inl"
#include "embedding.inl"
#include "linear.inl"

#define FOURBIT_STRING(name) #name
#define FOURBIT_NAME(name) FOURBIT_STRING(name)
#define FOURBIT_JOIN(a, b) a##b
#define FOURBIT_TABLE(isa) FOURBIT_JOIN(kernels_, isa)

namespace fourbit {

namespace FOURBIT_ISA {

// A kernel as its callers get it: in the default floating-point environment on the calling thread too, for what it
// computes before and after its tasks.
template <auto Kernel>
struct Entry;
template <typename Result, typename... Arguments, Result (*Kernel)(Arguments...)>
struct Entry<Kernel> {
  static Result call(Arguments... arguments) {
    const FloatEnvironment environment;
    return Kernel(arguments...);
  }
};

}  // namespace FOURBIT_ISA

const Kernels FOURBIT_TABLE(FOURBIT_ISA) = {
    FOURBIT_NAME(FOURBIT_ISA),
    FOURBIT_ISA::Entry<FOURBIT_ISA::quantize_4bit>::call,
    FOURBIT_ISA::Entry<FOURBIT_ISA::dequantize_4bit>::call,
    FOURBIT_ISA::Entry<FOURBIT_ISA::quantize_blockwise>::call,
    FOURBIT_ISA::Entry<FOURBIT_ISA::dequantize_blockwise>::call,
    FOURBIT_ISA::Entry<FOURBIT_ISA::embedding_4bit>::call,
    FOURBIT_ISA::Entry<FOURBIT_ISA::linear_4bit>::call,
    FOURBIT_ISA::Entry<FOURBIT_ISA::linear_4bit_grad>::call,
    FOURBIT_ISA::Entry<FOURBIT_ISA::grouped_linear_4bit>::call,
    FOURBIT_ISA::Entry<FOURBIT_ISA::grouped_linear_4bit_grad>::call,
};

}  // namespace fourbit
