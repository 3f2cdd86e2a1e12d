// Included by each isa/*.cpp after its simd header: all kernels, compiled for that instruction set.
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

const Kernels FOURBIT_TABLE(FOURBIT_ISA) = {
    FOURBIT_NAME(FOURBIT_ISA),
    FOURBIT_ISA::quantize_4bit,
    FOURBIT_ISA::dequantize_4bit,
    FOURBIT_ISA::quantize_blockwise,
    FOURBIT_ISA::dequantize_blockwise,
    FOURBIT_ISA::embedding_4bit,
    FOURBIT_ISA::linear_4bit,
    FOURBIT_ISA::linear_4bit_grad,
    FOURBIT_ISA::grouped_linear_4bit,
    FOURBIT_ISA::grouped_linear_4bit_grad,
};

}  // namespace fourbit
