// embedding_4bit: rows of a packed weight, the bits of dequantize_4bit. Defines: DTYPE, NESTED, WIDE (64-bit ids).
#include "packed.h"
#include "store.h"

#define THREADS 256

// ids [rows]; a weight [vocabulary, dim] in blocks of 1 << shift elements; out [rows, dim] in DTYPE, 16-byte aligned;
// 1 << log_lanes threads work on a row; `aligned`: packed is 4-byte aligned and dim a multiple of 8.
FB_KERNEL(THREADS)
embedding_4bit(const void* ids, const u8* packed, const void* absmax, const float* code, void* out, i64 rows, i64 dim,
               i64 vocabulary, i64 shift, const float* nested_absmax, const float* nested_code,
               const float* nested_offset, i64 log_lanes, i64 aligned) {
    __shared__ float table[16];
    if (threadIdx.x < 16) table[threadIdx.x] = code[threadIdx.x];
    Scales scales = make_scales(absmax, nested_absmax, nested_code, nested_offset);
    block_barrier();

    i64 row = ((i64)blockIdx.x * THREADS + threadIdx.x) >> log_lanes;
    if (row >= rows) return;
    i64 id = WIDE ? ((const i64*)ids)[row] : ((const int*)ids)[row];
    if ((u64)id >= (u64)vocabulary) {
        device_fail("embedding_4bit: an id is out of range", __FILE__, __LINE__);
        return;
    }
    i64 lanes = 1ll << log_lanes;
    for (i64 column = 8 * (threadIdx.x & (lanes - 1)); column < dim; column += 8 * lanes) {
        i64 element = id * dim + column, to = row * dim + column;
        if (aligned) {
            float x[8];
            decode8(table, *(const u32*)(packed + (element >> 1)), scales(element >> shift), x);
            store8(out, to, x);
            continue;
        }
        for (int i = 0; i < 8 && column + i < dim; ++i)
            store1(out, to + i, decode1(table, packed, element + i, scales(element + i >> shift)));
    }
}
