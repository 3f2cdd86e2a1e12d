// Columns of a 4-bit weight, decoded into a dense scratch matrix. Defines: DTYPE, NESTED.
#include "packed.h"
#include "store.h"

#define THREADS 256

// A weight of rows of k elements in blocks of 1 << shift; out [rows, width] in DTYPE, 16-byte aligned, gets the columns
// from `column` on of its first `rows` rows. `aligned`: packed is 4-byte aligned, and k, column, width divide by 8.
FB_KERNEL(THREADS)
dequantize_slice(const u8* packed, const void* absmax, const float* code, void* out, i64 rows, i64 k, i64 column,
                 i64 width, i64 shift, const float* nested_absmax, const float* nested_code,
                 const float* nested_offset, i64 aligned) {
    __shared__ float table[16];
    if (threadIdx.x < 16) table[threadIdx.x] = code[threadIdx.x];
    Scales scales = make_scales(absmax, nested_absmax, nested_code, nested_offset);
    block_barrier();

    // a block's threads take neighbouring groups of eight of one row, blockIdx.y says which part of the row
    const i64 at = ((i64)blockIdx.y * THREADS + threadIdx.x) * 8;
    if (at >= width) return;
#pragma unroll 4
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        i64 element = row * k + column + at, to = row * width + at;
        if (aligned) {
            float x[8];
            decode8(table, load_once((const u32*)(packed + (element >> 1))), scales(element >> shift), x);
            store8(out, to, x);
            continue;
        }
        for (int i = 0; i < 8 && at + i < width; ++i)
            store1(out, to + i, decode1(table, packed, element + i, scales(element + i >> shift)));
    }
}
