// The gradient: what a thread that decodes has of each step, 64 elements of a row of the weight, and their scales.
#pragma once
#include "matmul_ring.h"
#include "matmul_values.h"

#define BLOCKS (BLOCKSIZE == 32 ? 2 : 1)  // of the weight in 64 elements

// What is known of a block's scale before it is needed: the scale, or what it is to be looked up by.
struct Scale {
    float value;
    u32 code;
};
FB_DEVICE Scale ask_scale(const ScaleSource& scales, u32 block, bool there) {
    Scale s = {0.0f, 0};
    if (there) {
#if NESTED
        s.code = ((const u8*)scales.absmax)[block];
        s.value = scales.nested_absmax[block >> 8];
#else
        s.value = ((const float*)scales.absmax)[block];
#endif
    }
    return s;
}
FB_DEVICE float get_scale(const ScaleSource& scales, Scale s, bool there) {
    if (NESTED) return there ? scales.nested(s.code, s.value) : 0.0f;
    return s.value;
}

// The thread's 64 elements of each step of a tile: where they are in the packed pair of steps, and their scales.
struct Place64 {
    u32 row, column;  // of the weight, those of the tile's first step
    u32 first;        // the row's first scale
    u32 at, swap;     // bytes in the pair of steps; what the row's 16-byte pieces are exchanged by
    bool inside;      // of the row

    __device__ __forceinline__ Place64(const Tile& t, u32 thread, u32 k) {
        row = t.step * STEP + thread % 64, column = t.output + thread / 64 * 64;
        at = thread % 64 * 64, swap = thread >> 1 & 3 ^ thread / 64 * 2;  // 16-byte pieces 2 and 3 in the upper half
        inside = column < k;
        first = (t.weight_row + row) * (k / BLOCKSIZE) + column / BLOCKSIZE;
    }

    // Whether a step has such elements.
    __device__ __forceinline__ bool there(const Tile& t, u32 step, u32 n) const {
        return step < t.steps && row + step * STEP < n && inside;
    }

    // The first of a step's scales.
    __device__ __forceinline__ u32 block(u32 step, u32 k) const { return first + step * (STEP * (k / BLOCKSIZE)); }

    // 16 of 32 bytes; `half`: which step of the pair.
    __device__ __forceinline__ u32 piece(u32 half, u32 i) const {
        return at + half * (STEP * 64) + ((i ^ swap) << 4);
    }
};
