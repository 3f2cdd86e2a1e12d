// Decoding: from codes and scales to exactly the 16-bit values that dequantize gives.
//
// A block of the weight has only sixteen values: they are computed once, and taken out of registers by byte permutations,
// four at a time.
#pragma once
#include "warpgroup.h"

// The sixteen values times a scale, rounded once: their low bytes, then their high ones.
struct Values {
    u32 low[4], high[4];

    __device__ __forceinline__ void build(const float (&code)[16], float scale) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 pair[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float a = mul_rn(code[4 * i + 2 * j], scale), b = mul_rn(code[4 * i + 2 * j + 1], scale);
                pair[j] = DTYPE == FB_BF16 ? floats_to_bf16x2(a, b) : floats_to_f16x2(a, b);
            }
            low[i] = permute(pair[0], pair[1], 0x6420);
            high[i] = permute(pair[0], pair[1], 0x7531);
        }
    }

    // Four elements: the two of byte 0, and of byte 1, the first in the high nibble. Of the codes' lower three bits
    // `choice` (in its lower half) chooses among eight bytes, twice; `upper` has a byte of ones for each that has the fourth.
    __device__ __forceinline__ void take(u32 choice, u32 upper, u32& first, u32& second) const {
        const u32 l = permute(low[2], low[3], choice) & upper | permute(low[0], low[1], choice) & ~upper;
        const u32 h = permute(high[2], high[3], choice) & upper | permute(high[0], high[1], choice) & ~upper;
        first = permute(l, h, 0x4051), second = permute(l, h, 0x6273);
    }

    // Those of the lower half of `codes`.
    __device__ __forceinline__ void decode(u32 codes, u32& first, u32& second) const {
        take(codes & 0x77777777u, permute(codes, codes << 4, 0x9d8c), first, second);
    }

    // All eight elements of a word.
    __device__ __forceinline__ u32x4 decode(u32 codes) const {
        const u32 choice = codes & 0x77777777u, shifted = codes << 4;
        u32x4 v;
        take(choice, permute(codes, shifted, 0x9d8c), v.x, v.y);
        take(choice >> 16, permute(codes, shifted, 0xbfae), v.z, v.w);
        return v;
    }
};

// Where scales come from.
struct ScaleSource {
    const void* absmax;
    const float* nested_absmax;
    u32 table;  // of nested_code, in shared memory
    float offset;

    // A nested scale; the product is rounded before the sum, as the format says.
    __device__ __forceinline__ float nested(u32 code, float unit) const {
        return add_rn(mul_rn(float_of(shared_load(table + 4 * code)), unit), offset);
    }
};
