// The product's operand by bytes: one table in shared memory of the two float32 codes that each byte of the weight stands
// for. A lookup, the products by the block's scale and one rounding make two elements: little arithmetic, and much of shared
// memory, which products with few rows of x leave free.
#pragma once
#include "matmul_rings.h"

#define COPIES 32           // of the table's pairs, side by side, so that lanes never meet in a bank: 256 bytes
#define PARTS (CHUNKS / 2)  // of a group: 32 of the inner dimension

// What a thread makes of the scale of a block in its row of the weight.
struct BlockMaker {
    __device__ __forceinline__ explicit BlockMaker(const float*) {}
    __device__ __forceinline__ void put(u32 to, u32 thread, float scale) const {
        shared_store(to + thread * 4, bits_of(scale));
    }
};

// What a lane decodes, for the rows g = lane / 4 and g + 8 of its warp's 16: in each word, which has eight elements, byte
// lane % 4. Two words are 16 elements of the inner dimension, those of a product.
struct Operand {
    static constexpr int AHEAD_OF_PRODUCTS = 2;  // groups that are loaded before they are decoded
    u32 words_at, scale_at;    // in a weight stage
    u32 byte, place;           // the lane's: what makes an address of a word's byte, and its copy of the table
    u32x4 words[2][PARTS][2];  // of two groups, of both rows
    float scales[2][PARTS][2];
    u32x2 pairs[PARTS][2][4];  // of one group: what has been looked up

    // Fills the table, together with the other threads that multiply.
    __device__ __forceinline__ Operand(u32 group, u32 thread, u32 shared, const float* code) {
        for (u32 at = group * GROUP + thread; at < 256 * COPIES / 2; at += 2 * GROUP) {
            const u32 of = at / (COPIES / 2), first = bits_of(code[of >> 4]), second = bits_of(code[of & 15]);
            shared_store4(shared + TABLE_AT + at * 16, u32x4{first, second, first, second});
        }
        const u32 lane = thread % 32, row = group * 64 + thread / 32 * 16 + lane / 4;
        words_at = row * 64 + ((row >> 1 & 3) << 4), scale_at = PACKED_BYTES + row * 4;
        byte = lane % 4 << 4 | 0x7604, place = (shared & 0xff000000u) | lane * 8;
        settle(byte);  // or the compiler computes it again and again
        products_barrier();
    }

    // What group `j` of a pair's products needs.
    __device__ __forceinline__ void load(u32 stage, int j) {
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            const int part = j * PARTS + i;
            const u32 from = stage + (words_at ^ part << 4);
            const u32 scale = stage + scale_at + part * 32 / BLOCKSIZE * BLOCK_BYTES;
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                words[j % 2][i][row] = shared_load4(from + row * 8 * 64);
                scales[j % 2][i][row] = float_of(shared_load(scale + row * 8 * 4));
            }
        }
    }

    __device__ __forceinline__ void look_up(int j) {
#pragma unroll
        for (int i = 0; i < PARTS; ++i)
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const u32x4& w = words[j % 2][i][row];
                const u32 each[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
                for (int c = 0; c < 4; ++c)  // at the lane's place, and 256 times the byte
                    pairs[i][row][c] = shared_load2_at<SHARED_BASE + TABLE_AT>(permute(each[c], place, byte));
            }
    }

    // The values, rounded once.
    __device__ __forceinline__ void decode(u32, int j, u32 (&a)[CHUNKS][4]) const {
#pragma unroll
        for (int i = 0; i < PARTS; ++i)
#pragma unroll
            for (int row = 0; row < 2; ++row)
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const float scale = scales[j % 2][i][row];
                    const float low = mul_rn(float_of(pairs[i][row][c].x), scale);
                    const float high = mul_rn(float_of(pairs[i][row][c].y), scale);
                    a[2 * i + c / 2][row + c % 2 * 2] =
                        DTYPE == FB_BF16 ? floats_to_bf16x2(low, high) : floats_to_f16x2(low, high);
                }
    }
};
