// The product's operand by tables: of each block of the weight in each row, the sixteen values that its codes can stand for,
// which the warpgroup that fills the rings computes once. Four elements take two lookups among registers for each byte of
// theirs: much arithmetic, and little of shared memory, of which products with many rows of x have none to spare.
#pragma once
#include "matmul_rings.h"

// What a thread makes of the scale of a block in its row of the weight.
struct BlockMaker {
    float code[16];

    __device__ __forceinline__ explicit BlockMaker(const float* code) {
#pragma unroll
        for (int i = 0; i < 16; ++i) this->code[i] = code[i];
    }
    __device__ __forceinline__ void put(u32 to, u32 thread, float scale) const {
        Values v;
        v.build(code, scale);
        to += thread * 16;
        shared_store4(to, u32x4{v.low[0], v.low[1], v.low[2], v.low[3]});
        shared_store4(to + PLANE_BYTES, u32x4{v.high[0], v.high[1], v.high[2], v.high[3]});
    }
};

FB_DEVICE void load_values(u32 from, Values& v) {
    const u32x4 low = shared_load4(from), high = shared_load4(from + PLANE_BYTES);
    v.low[0] = low.x, v.low[1] = low.y, v.low[2] = low.z, v.low[3] = low.w;
    v.high[0] = high.x, v.high[1] = high.y, v.high[2] = high.z, v.high[3] = high.w;
}

// What a lane decodes of a pair of steps, for the rows g = lane / 4 and g + 8 of its warp's 16: in each word, which has
// eight elements, byte lane % 4. Two words are 16 elements of the inner dimension, those of a product.
struct Operand {
    static constexpr int AHEAD_OF_PRODUCTS = 1;  // groups that are loaded before they are decoded
    u32 words_at, table_at, bytes;  // in a weight stage; the selector of the bytes of two words
    u32x4 words[2][CHUNKS / 2];     // of both rows
    Values values[2];

    __device__ __forceinline__ Operand(u32 group, u32 thread, u32, const float*) {
        const u32 lane = thread % 32, row = group * 64 + thread / 32 * 16 + lane / 4;
        words_at = row * 64 + ((row >> 1 & 3) << 4), table_at = PACKED_BYTES + row * 16;
        bytes = lane % 4 * 0x11 + 0x40;
        settle(bytes);  // or the compiler computes it again and again
    }

    // What group `j` of the pair's products needs.
    __device__ __forceinline__ void load(u32 stage, int j) {
#pragma unroll
        for (int i = 0; i < CHUNKS / 2; ++i) {
            const u32 from = stage + (words_at ^ (j * (CHUNKS / 2) + i) << 4);
            words[0][i] = shared_load4(from), words[1][i] = shared_load4(from + 8 * 64);
        }
        if (j * BLOCKS % (8 / CHUNKS) == 0) load_tables(stage, j * BLOCKS / (8 / CHUNKS));
    }
    __device__ __forceinline__ void load_tables(u32 stage, int block) {
        const u32 from = stage + table_at + block * BLOCK_BYTES;
        load_values(from, values[0]), load_values(from + 8 * 16, values[1]);
    }
    __device__ __forceinline__ void look_up(int) {}

    __device__ __forceinline__ void decode(u32 stage, int j, u32 (&a)[CHUNKS][4]) {
#pragma unroll
        for (int i = 0; i < CHUNKS / 2; ++i) {
            if (i > 0 && BLOCKSIZE == 32) load_tables(stage, j * BLOCKS / (8 / CHUNKS) + i);
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const u32x4& w = words[row][i];
                values[row].decode(permute(w.x, w.y, bytes), a[2 * i][row], a[2 * i][row + 2]);
                values[row].decode(permute(w.z, w.w, bytes), a[2 * i + 1][row], a[2 * i + 1][row + 2]);
            }
        }
    }
};
