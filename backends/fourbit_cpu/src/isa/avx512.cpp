#define FOURBIT_ISA avx512
#include "simd/avx512.h"
#include "simd/avx512_quantize.h"
#include "table.inl"
