// Warps that decode the weight: 64 elements a thread and step, to exactly the 16-bit values that dequantize gives them.
//
// A block of the weight has only sixteen values: each thread computes those of its block, as bytes of registers, and
// takes them out by byte permutations, four at a time.
#pragma once
#include "matmul_ring.h"

#define BLOCKS (BLOCKSIZE == 32 ? 2 : 1)  // of the weight in 64 elements

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

    // Sixteen elements from two words, eight each; the first of a byte's pair in the high nibble.
    __device__ __forceinline__ void decode(u32 first, u32 second, u32x4& a, u32x4& b) const {
        // the lower three bits of a code choose among eight bytes, twice; the fourth between these
        const u32 words[2] = {first, second};
        u32 choice[4], half[4], v[8];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            choice[2 * i] = words[i] & 0x77777777u, choice[2 * i + 1] = choice[2 * i] >> 16;
            half[2 * i] = and_or<0x44444444u, 0x32103210u>(words[i] >> 1), half[2 * i + 1] = half[2 * i] >> 16;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 s = choice[i];
            u32 l = permute(permute(low[0], low[1], s), permute(low[2], low[3], s), half[i]);
            u32 h = permute(permute(high[0], high[1], s), permute(high[2], high[3], s), half[i]);
            v[2 * i] = permute(l, h, 0x4051);
            v[2 * i + 1] = permute(l, h, 0x6273);
        }
        a = u32x4{v[0], v[1], v[2], v[3]}, b = u32x4{v[4], v[5], v[6], v[7]};
    }
};

// What is known of a block's scale before it is needed: the scale, or what it is to be looked up by.
struct Scale {
    float value;
    u32 code;
};

struct ScaleSource {
    const void* absmax;
    const float* nested_absmax;
    u32 table;  // of nested_code, in shared memory
    float offset;

    __device__ __forceinline__ Scale ask(u32 block, bool there) const {
        Scale s = {0.0f, 0};
        if (there) {
#if NESTED
            s.code = ((const u8*)absmax)[block];
            s.value = nested_absmax[block >> 8];
#else
            s.value = ((const float*)absmax)[block];
#endif
        }
        return s;
    }
    // The product is rounded before the sum, as the format says.
    __device__ __forceinline__ float get(Scale s, bool there) const {
#if NESTED
        return there ? add_rn(mul_rn(float_of(shared_load(table + 4 * s.code)), s.value), offset) : 0.0f;
#else
        return s.value;
#endif
    }
};

// The thread's 64 elements of each step of a tile: where they are in the packed pair of steps, and their scales.
struct Place64 {
    u32 row, column;  // of the weight, those of the tile's first step
    u32 first;        // the row's first scale
    u32 at, swap;     // bytes in the pair of steps; what the row's 16-byte pieces are exchanged by
    bool inside;      // of the row

    __device__ __forceinline__ Place64(const Tile& t, u32 thread, u32 n, u32 k) {
#if TRANSPOSED
        row = t.step * STEP + thread % 64, column = t.output + thread / 64 * 64;
        at = thread % 64 * 64, swap = thread >> 1 & 3 ^ thread / 64 * 2;  // 16-byte pieces 2 and 3 in the upper half
#else
        row = t.output + thread, column = t.step * STEP;
        at = thread * 64, swap = thread >> 1 & 3;
#endif
        inside = !TRANSPOSED || column < k;
        first = (t.weight_row + row) * (k / BLOCKSIZE) + (TRANSPOSED ? column / BLOCKSIZE : 0);
    }

    // Whether a step has such elements.
    __device__ __forceinline__ bool there(const Tile& t, u32 step, u32 n) const {
        return step < t.steps && (TRANSPOSED ? row + step * STEP : row) < n && inside;
    }

    // The first of a step's scales.
    __device__ __forceinline__ u32 block(u32 step, u32 k) const {
        return TRANSPOSED ? first + step * (STEP * (k / BLOCKSIZE)) : first + (column + step * STEP) / BLOCKSIZE;
    }

    // 16 of 32 bytes; `half`: which step of the pair.
    __device__ __forceinline__ u32 piece(u32 half, u32 i) const {
        return TRANSPOSED ? at + half * (STEP * 64) + ((i ^ swap) << 4) : at + ((2 * half + i ^ swap) << 4);
    }
};
