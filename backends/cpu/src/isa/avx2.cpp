#define FOURBIT_ISA avx2
#include "simd/avx2.h"
#include "table.inl"
