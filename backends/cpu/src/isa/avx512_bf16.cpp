#define FOURBIT_ISA avx512_bf16
#include "simd/avx512.h"
#include "table.inl"
