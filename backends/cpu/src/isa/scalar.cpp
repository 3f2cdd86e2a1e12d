#define FOURBIT_ISA scalar
#include "simd/scalar.h"
#include "table.inl"
