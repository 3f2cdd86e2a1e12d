// Quantization's first half: eight elements a thread, a scale for each block of BLOCKSIZE, elements over it.
//
// The host defines DTYPE and BLOCKSIZE, and SIGNED (1: a scale takes the sign of the element it comes from).
#pragma once
#include "shim.h"

#define LANES (BLOCKSIZE / 8)  // threads that share a block
#define THREADS (LANES > 256 ? LANES : 256)
#define WORDS (DTYPE == FB_F32 ? 8 : 4)

struct Elements {
    u32 word[WORDS];

    // Elements first … first + 7, zeros from `count` on. `aligned`: a vector load of all of them will do.
    __device__ __forceinline__ void load(const void* source, i64 first, i64 count, bool aligned) {
        if (aligned) {
            const u32x4* vector = (const u32x4*)((const char*)source + first * (WORDS / 2));
#pragma unroll
            for (int i = 0; i < WORDS / 4; ++i) {
                u32x4 v = load_once(vector + i);
                word[4 * i] = v.x, word[4 * i + 1] = v.y, word[4 * i + 2] = v.z, word[4 * i + 3] = v.w;
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
#if DTYPE == FB_F32
            word[i] = first + i < count ? ((const u32*)source)[first + i] : 0;
#else
            const u16* halves = (const u16*)source + first + 2 * i;
            word[i] = first + 2 * i < count ? halves[0] : 0;
            if (first + 2 * i + 1 < count) word[i] |= (u32)halves[1] << 16;
#endif
        }
    }

    // The largest magnitude as a float's bits: as integers they compare alike, NaN above infinity.
    __device__ __forceinline__ u32 largest() const {
        u32 most = 0;
#if DTYPE == FB_F32
#pragma unroll
        for (int i = 0; i < WORDS; ++i) most = max_u32(most, word[i] & 0x7fffffffu);
        return most;
#else
#pragma unroll
        for (int i = 0; i < WORDS; ++i) most = max_u16x2(most, word[i] & 0x7fff7fffu);
        most = max_u32(most >> 16, most & 0xffffu);
        return DTYPE == FB_BF16 ? most << 16 : bits_of(f16_to_float(most));
#endif
    }

    __device__ __forceinline__ float value(int i) const {
#if DTYPE == FB_F32
        return float_of(word[i]);
#elif DTYPE == FB_BF16
        return i % 2 ? float_of(word[i / 2] & 0xffff0000u) : float_of(word[i / 2] << 16);
#else
        return f16_to_float(i % 2 ? word[i / 2] >> 16 : word[i / 2] & 0xffffu);
#endif
    }
};

// The maximum over the threads of one quantization block; every thread of the thread block calls it.
FB_DEVICE u32 group_max(u32 v, u32* scratch) {
#pragma unroll
    for (int mask = (LANES < FB_WAVE ? LANES : FB_WAVE) / 2; mask > 0; mask /= 2) {
        v = max_u32(v, shuffle_xor(v, mask));
    }
#if LANES > FB_WAVE
    u32 wave = threadIdx.x / FB_WAVE, first = threadIdx.x / LANES * (LANES / FB_WAVE);
    block_barrier();  // the scratch may still be read from the call before
    scratch[wave] = v;
    block_barrier();
#pragma unroll
    for (int i = 0; i < LANES / FB_WAVE; ++i) {
        v = max_u32(v, scratch[first + i]);
    }
#endif
    return v;
}

// x / scale rounded once, where the scale is subnormal and 1 / scale would overflow. Both are scaled up, which is
// exact; two corrections by the exact remainder make an approximate quotient the nearest one (Markstein).
FB_DEVICE void divide_tiny(float (&x)[8], float scale) {
    const float up = float_of(0x71800000u);  // 2^100
    scale = mul_rn(scale, up);
    float inverse = reciprocal_rn(scale);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float part = mul_rn(x[i], up), quotient = mul_rn(part, inverse);
        quotient = fma_rn(fma_rn(-scale, quotient, part), inverse, quotient);
        x[i] = fma_rn(fma_rn(-scale, quotient, part), inverse, quotient);
    }
}

// Replaces the elements by their quotients with the block's scale, and returns the scale.
FB_DEVICE float normalize(const Elements& elements, float (&x)[8], u32* scratch) {
    u32 largest = group_max(elements.largest(), scratch);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = elements.value(i);
    float scale = float_of(largest);
#if SIGNED
    u32 reached = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) reached |= bits_of(x[i]) == largest;
    if (!group_max(reached, scratch)) scale = -scale;
#endif
    float factor;
    if (largest - 0x00800000u < 0x7f000000u) {  // neither zero, subnormal, Inf nor NaN
        factor = reciprocal_rn(scale);
    } else {
        if (largest != 0 && largest < 0x00800000u) {
            divide_tiny(x, scale);
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) x[i] = 0.0f;
        }
        factor = 1.0f;
        if (largest >= 0x7f800000u) scale = float_of(0x7fc00000u);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = mul_rn(x[i], factor);
    return scale;
}
