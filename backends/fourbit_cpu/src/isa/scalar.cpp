#define FOURBIT_ISA scalar
#include "simd/scalar.h"
#include "simd/scalar_quantize.h"
#include "table.inl"
