#define FOURBIT_ISA neon
#include "simd/neon.h"
#include "table.inl"
