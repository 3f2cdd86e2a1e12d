#define FOURBIT_ISA neon
#include "simd/neon.h"
#include "simd/neon_quantize.h"
#include "table.inl"
