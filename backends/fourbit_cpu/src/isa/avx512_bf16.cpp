#define FOURBIT_ISA avx512_bf16
#include "simd/avx512.h"
#include "simd/avx512_quantize.h"
#include "table.inl"
