// quantize_4bit: bits as fourbit.reference gives them. Defines: DTYPE, BLOCKSIZE, SIGNED.
#include "blocks.h"
#include "codebook.h"

struct Tables {
    Codebook<16> codebook;
    Buckets buckets;
};

// The four bytes of eight quotients, the first of a pair in the high nibble.
template <bool SHORTCUT, bool ORDERED>
FB_DEVICE u32 encode(const Tables& tables, const float (&x)[8]) {
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        u32 offset =
            SHORTCUT ? tables.buckets.search(tables.codebook, x[i]) : tables.codebook.search(x[i]);
        if (!ORDERED) offset = tables.codebook.code(offset) << 2;
        int shift = i / 2 * 8 + (i % 2 ? 0 : 4);
        word |= shift ? offset << (shift - 2 & 31) : offset >> 2;
    }
    return word;
}

// w [count] in DTYPE; code float [16]; packed u8 [(count + 1) / 2], 4-byte aligned; absmax float [count / BLOCKSIZE];
// `aligned`: w is 16-byte aligned.
FB_KERNEL(THREADS)
quantize_4bit(const void* w, const float* code, u8* packed, float* absmax, i64 count, i64 aligned) {
    __shared__ Tables tables;
    __shared__ u32 scratch[THREADS / FB_WAVE];
    const i64 tile = 8 * THREADS, step = (i64)gridDim.x * tile;
    i64 base = (i64)blockIdx.x * tile, mine = 8 * threadIdx.x;
    Elements elements;
    elements.load(w, base + mine, count, aligned && base + tile <= count);
    tables.codebook.build(code, threadIdx.x);
    tables.buckets.build(tables.codebook, threadIdx.x);
    bool ordered = tables.codebook.ordered, shortcut = !tables.buckets.crowded;

    for (; base < count; base += step) {
        i64 first = base + mine;
        bool whole = base + tile <= count;
        Elements next;  // in flight while this one is worked on
        next.load(w, first + step, count, aligned && base + step + tile <= count);
        float x[8];
        float scale = normalize(elements, x, scratch);
        u32 word;
        if (shortcut && ordered) {
            word = encode<true, true>(tables, x);
        } else {
            word = encode<false, false>(tables, x);
        }
        if (whole) {
            *(u32*)(packed + first / 2) = word;
        } else {
            for (int i = 0; i < 4; ++i)
                if (first + 2 * i < count) packed[first / 2 + i] = (u8)(word >> 8 * i);
        }
        if (threadIdx.x % LANES == 0 && first < count) absmax[first / BLOCKSIZE] = scale;
        elements = next;
    }
}
