// The product's operand by bytes: one table in shared memory of the two codes that each byte of the weight stands for. A
// lookup and the products by the block's scale make two elements: little arithmetic, and much of shared memory, which
// products with few rows of x leave free.
#pragma once
#include "matmul_rings.h"

#define PARTS (CHUNKS / 2)  // of a group: 32 of the inner dimension

#if DTYPE == FB_BF16
// Both codes in bfloat16, times the scale as the sum of two: what is rounded are the codes, and the element once. Half the
// bytes of float32 codes; as accurate where the codes are bfloat16 numbers, else a product's error grows by a seventh.
typedef u32 Pair;
typedef u32 BlockScale;
#define PAIR_BYTES 4
#define load_pair shared_load_at
FB_DEVICE u32x4 copies_of_pair(float first, float second) {
    const u32 pair = floats_to_bf16x2(first, second);
    return u32x4{pair, pair, pair, pair};
}
FB_DEVICE u32 stored_scale(float scale) {
    const u32 high = bits_of(scale) & 0xffff0000u;
    return high | float_to_bf16(scale - float_of(high));
}
FB_DEVICE BlockScale block_scale(u32 stored) { return stored; }
FB_DEVICE u32 elements_of(Pair pair, BlockScale scale) {
    return multiply_add2(pair, permute(scale, scale, 0x3232), multiply2(pair, permute(scale, scale, 0x1010)));
}
#else
// In float16 the range of a scale does not allow that: float32 codes, and each element is rounded once.
typedef u32x2 Pair;
typedef float BlockScale;
#define PAIR_BYTES 8
#define load_pair shared_load2_at
FB_DEVICE u32x4 copies_of_pair(float first, float second) {
    return u32x4{bits_of(first), bits_of(second), bits_of(first), bits_of(second)};
}
FB_DEVICE u32 stored_scale(float scale) { return bits_of(scale); }
FB_DEVICE BlockScale block_scale(u32 stored) { return float_of(stored); }
FB_DEVICE u32 elements_of(Pair pair, BlockScale scale) {
    return floats_to_f16x2(mul_rn(float_of(pair.x), scale), mul_rn(float_of(pair.y), scale));
}
#endif

// What a thread makes of the scale of a block in its row of the weight.
struct BlockMaker {
    __device__ __forceinline__ explicit BlockMaker(const float*) {}
    __device__ __forceinline__ void put(u32 to, u32 thread, float scale) const {
        shared_store(to + thread * 4, stored_scale(scale));
    }
};

// What a lane decodes, for the rows g = lane / 4 and g + 8 of its warp's 16: in each word, which has eight elements, byte
// lane % 4. Two words are 16 elements of the inner dimension, those of a product.
struct Operand {
    static constexpr int AHEAD_OF_PRODUCTS = 2;  // groups that are loaded before they are decoded
    u32 words_at, scale_at;    // in a weight stage
    u32 byte, place;           // the lane's: what makes an address of a word's byte, and its copy of the table
    u32x4 words[2][PARTS][2];  // of two groups, of both rows
    BlockScale scales[2][PARTS][2];
    Pair pairs[PARTS][2][4];  // of one group: what has been looked up

    // Fills the table, together with the other threads that multiply.
    __device__ __forceinline__ Operand(u32 group, u32 thread, u32 shared, const float* code) {
        // a copy for each lane, so that they never meet in a bank
        constexpr u32 pieces = 32 * PAIR_BYTES / 16;
        for (u32 at = group * GROUP + thread; at < 256 * pieces; at += 2 * GROUP) {
            const u32 byte = at / pieces;
            shared_store4(shared + TABLE_AT + byte * 256 + at % pieces * 16, copies_of_pair(code[byte >> 4], code[byte & 15]));
        }
        const u32 lane = thread % 32, row = group * 64 + thread / 32 * 16 + lane / 4;
        words_at = row * 64 + ((row >> 1 & 3) << 4), scale_at = PACKED_BYTES + row * 4;
        byte = lane % 4 << 4 | 0x7604, place = (shared & 0xff000000u) | lane * PAIR_BYTES;
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
                scales[j % 2][i][row] = block_scale(shared_load(scale + row * 8 * 4));
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
                    pairs[i][row][c] = load_pair<SHARED_BASE + TABLE_AT>(permute(each[c], place, byte));
            }
    }

    __device__ __forceinline__ void decode(u32, int j, u32 (&a)[CHUNKS][4]) const {
#pragma unroll
        for (int i = 0; i < PARTS; ++i)
#pragma unroll
            for (int row = 0; row < 2; ++row)
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    a[2 * i + c / 2][row + c % 2 * 2] = elements_of(pairs[i][row][c], scales[j % 2][i][row]);
    }
};
