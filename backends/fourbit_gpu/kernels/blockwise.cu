// quantize_blockwise and dequantize_blockwise: 8 bits, a table of 256. Defines: DTYPE, BLOCKSIZE.
#define SIGNED 0
#include "blocks.h"
#include "codebook.h"
#include "store.h"

// x [count] in DTYPE; code float [256]; codes u8 [count], 8-byte aligned; absmax float [count / BLOCKSIZE].
FB_KERNEL(THREADS)
quantize_blockwise(const void* x, const float* code, u8* codes, float* absmax, i64 count, i64 aligned) {
    __shared__ Codebook<256> codebook;
    __shared__ u32 scratch[THREADS / FB_WAVE];
    codebook.build(code, threadIdx.x);

    const i64 tile = 8 * THREADS, step = (i64)gridDim.x * tile;
    for (i64 base = (i64)blockIdx.x * tile; base < count; base += step) {
        i64 first = base + 8 * threadIdx.x;
        Elements elements;
        elements.load(x, first, count, aligned && base + tile <= count);
        float quotient[8];
        float scale = normalize(elements, quotient, scratch);
        u32 word[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < 8; ++i) word[i / 4] |= codebook.code(codebook.search(quotient[i])) << i % 4 * 8;
        if (first + 8 <= count) {
            *(u32x2*)(codes + first) = u32x2{word[0], word[1]};
        } else {
            for (int i = 0; i < 8; ++i)
                if (first + i < count) codes[first + i] = (u8)(word[i / 4] >> i % 4 * 8);
        }
        if (threadIdx.x % LANES == 0 && first < count) absmax[first / BLOCKSIZE] = scale;
    }
}

// codes u8 [count]; absmax float [count / BLOCKSIZE]; code float [256]; out [count] in DTYPE, 16-byte aligned.
FB_KERNEL(THREADS)
dequantize_blockwise(const u8* codes, const float* absmax, const float* code, void* out, i64 count, i64 aligned) {
    __shared__ float table[256];
    for (u32 i = threadIdx.x; i < 256; i += THREADS) table[i] = code[i];
    block_barrier();

    const i64 tile = 8 * THREADS, step = (i64)gridDim.x * tile;
    for (i64 base = (i64)blockIdx.x * tile; base < count; base += step) {
        i64 first = base + 8 * threadIdx.x;
        if (first >= count) continue;
        float scale = absmax[first / BLOCKSIZE];
        float x[8];
        if (aligned && first + 8 <= count) {
            u32x2 word = *(const u32x2*)(codes + first);
#pragma unroll
            for (int i = 0; i < 8; ++i) x[i] = mul_rn(table[(i < 4 ? word.x : word.y) >> i % 4 * 8 & 255], scale);
            store8(out, first, x);
        } else {
            for (int i = 0; i < 8; ++i)
                if (first + i < count) store1(out, first + i, mul_rn(table[codes[first + i]], scale));
        }
    }
}
