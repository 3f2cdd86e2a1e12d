// dequantize_4bit: bits as fourbit.reference gives them. Defines: DTYPE, NESTED.
#include "packed.h"
#include "store.h"

#define THREADS 256
#define UNROLL 2

// packed u8 [(count + 1) / 2]; code float [16]; blocks of 1 << shift elements; out [count] in DTYPE, 16-byte aligned;
// `aligned`: packed is 4-byte aligned.
FB_KERNEL(THREADS)
dequantize_4bit(const u8* packed, const void* absmax, const float* code, void* out, i64 count, i64 shift,
                const float* nested_absmax, const float* nested_code, const float* nested_offset, i64 aligned) {
    __shared__ float table[16];
    if (threadIdx.x < 16) table[threadIdx.x] = code[threadIdx.x];
    Scales scales = make_scales(absmax, nested_absmax, nested_code, nested_offset);

    const i64 tile = 8 * THREADS * UNROLL;
    i64 base = (i64)blockIdx.x * tile, first = base + 8 * threadIdx.x;  // one tile a block
    if (aligned && base + tile <= count) {
        u32 word[UNROLL];
        float scale[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            i64 i = first + 8 * THREADS * u;
            word[u] = load_once((const u32*)(packed + (i >> 1)));
            scale[u] = scales(i >> shift);
        }
        block_barrier();  // the table; here, with the loads on their way
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            float x[8];
            decode8(table, word[u], scale[u], x);
            store8(out, first + 8 * THREADS * u, x);
        }
        return;
    }
    block_barrier();
    for (int u = 0; u < UNROLL; ++u) {
        i64 start = first + 8 * THREADS * u;
        if (start >= count) break;
        float scale = scales(start >> shift);  // eight elements never straddle blocks
        for (int i = 0; i < 8; ++i)
            if (start + i < count) store1(out, start + i, decode1(table, packed, start + i, scale));
    }
}
