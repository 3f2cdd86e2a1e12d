// Reading a packed 4-bit weight: its scales, double-quantized or not (NESTED), and its elements.
#pragma once
#include "shim.h"

struct Scales {
    const void* absmax;          // NESTED ? u8 : float [blocks]
    const float* nested_absmax;  // [blocks / 256]
    const float* nested_code;    // [256]
    float offset;

    // The product is rounded before the sum, as the format says.
    __device__ __forceinline__ float operator()(i64 block) const {
#if NESTED
        float code = nested_code[((const u8*)absmax)[block]];
        return add_rn(mul_rn(code, nested_absmax[block >> 8]), offset);
#else
        return ((const float*)absmax)[block];
#endif
    }
};

FB_DEVICE Scales make_scales(const void* absmax, const float* nested_absmax, const float* nested_code,
                             const float* nested_offset) {
#if NESTED
    return Scales{absmax, nested_absmax, nested_code, *nested_offset};
#else
    return Scales{absmax, 0, 0, 0.0f};
#endif
}

// Eight elements from four bytes, the first of a pair in the high nibble; `code` lies in shared memory.
FB_DEVICE void decode8(const float* code, u32 word, float scale, float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        int shift = i / 2 * 8 + (i % 2 ? 0 : 4) - 2;
        u32 offset = (shift < 0 ? word << 2 : word >> (shift & 31)) & 0x3cu;  // of a float
        x[i] = mul_rn(*(const float*)((const char*)code + offset), scale);
    }
}

FB_DEVICE float decode1(const float* code, const u8* packed, i64 i, float scale) {
    u32 byte = packed[i >> 1];
    return mul_rn(code[i & 1 ? byte & 15 : byte >> 4], scale);
}
