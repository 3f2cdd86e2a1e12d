#define FOURBIT_ISA avx2
#include "simd/avx2.h"
#include "simd/avx2_quantize.h"
#include "table.inl"
