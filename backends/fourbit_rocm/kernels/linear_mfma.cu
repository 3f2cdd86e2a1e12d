// linear_mfma: y = x · wᵀ (+ bias) for at most 16 rows of x, on CDNA's matrix cores.
//
// The product of 16x16x16: lane (r = lane % 16, q = lane / 16) gives four consecutive k of row r of either factor, and
// gets column r of rows 4q … 4q + 3 of the result. Rows are those of x and columns those of w, so that a lane's results
// all belong to the row of w that it decodes, and one scale serves them. For 64 elements of k a lane takes the 16 from
// 16q on, which are eight contiguous bytes: product j of four uses bytes 2j and 2j + 1.
// Defines: DTYPE (FB_BF16 or FB_F16), NESTED.
#include "packed.h"
#include "store.h"

#define THREADS 256
#define WAVES (THREADS / FB_WAVE)
// Of the table, over the banks of the LDS: 16 KB, and 4 KB of sums. A compute unit's 64 KB hold three workgroups, the
// 160 KB of CDNA 4 eight.
#define COPIES 16

#if FB_HIP
typedef float f32x4 __attribute__((ext_vector_type(4)));
typedef short s16x4 __attribute__((ext_vector_type(4)));
typedef _Float16 f16x4 __attribute__((ext_vector_type(4)));

FB_DEVICE f32x4 product(u32x2 x, u32x2 w, f32x4 sum) {
#if DTYPE == FB_BF16
    return __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(__builtin_bit_cast(s16x4, x), __builtin_bit_cast(s16x4, w), sum, 0,
                                                     0, 0);
#else
    return __builtin_amdgcn_mfma_f32_16x16x16f16(__builtin_bit_cast(f16x4, x), __builtin_bit_cast(f16x4, w), sum, 0, 0,
                                                 0);
#endif
}
#else
#error "linear_mfma.cu is for CDNA's matrix cores"
#endif

// x [m, k] and y [m, n] in DTYPE; packed u8 [n, k / 2]; both 16-byte aligned; k a multiple of 64; bias [n] or null;
// blocks of 1 << shift >= 64 elements.
FB_KERNEL(THREADS)
linear_mfma(const u16* x, const u8* packed, const void* absmax, const float* code, const float* nested_absmax,
            const float* nested_code, const float* nested_offset, const void* bias, u16* y, i64 m, i64 n, i64 k,
            i64 shift) {
    __shared__ u32 table[256 * COPIES];
    __shared__ float sums[WAVES][4][64];
    for (u32 i = threadIdx.x; i < 256 * COPIES; i += THREADS) {
        u32 byte = i / COPIES;
        table[i] = pair(code[byte >> 4], code[byte & 15]);
    }
    Scales scales = make_scales(absmax, nested_absmax, nested_code, nested_offset);
    block_barrier();

    const u32 lane = threadIdx.x % FB_WAVE, wave = threadIdx.x / FB_WAVE, r = lane % 16, q = lane / 16;
    const u32* mine = table + lane % COPIES;
    const u16* my_x = x + (r < m ? r : m - 1) * k + 16 * q;  // rows past the end repeat the last, not stored
    for (i64 top = (i64)blockIdx.x * 16; top < n; top += (i64)gridDim.x * 16) {
        const i64 row = top + r < n ? top + r : n - 1;
        const u8* my_w = packed + ((row * k + 16 * q) >> 1);
        f32x4 total = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
        for (i64 at = 64 * wave; at < k; at += 64 * WAVES) {
            const u32x2 word = *(const u32x2*)(my_w + (at >> 1));
            const u32x4 x0 = *(const u32x4*)(my_x + at), x1 = *(const u32x4*)(my_x + at + 8);
            const float scale = scales((row * k + at) >> shift);
            const u32x2 xs[4] = {{x0.x, x0.y}, {x0.z, x0.w}, {x1.x, x1.y}, {x1.z, x1.w}};
            f32x4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const u32 bytes = (j < 2 ? word.x : word.y) >> 16 * (j % 2);
                sum = product(xs[j], u32x2{mine[(bytes & 255) * COPIES], mine[(bytes >> 8 & 255) * COPIES]}, sum);
            }
#pragma unroll
            for (int v = 0; v < 4; ++v) total[v] = __builtin_fmaf(scale, sum[v], total[v]);
        }
        // the waves' shares of k, in a fixed order
#pragma unroll
        for (int v = 0; v < 4; ++v) sums[wave][v][lane] = total[v];
        block_barrier();
        {
            const u32 from = threadIdx.x % 64, v = threadIdx.x / 64;  // 256 results, one a thread
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < WAVES; ++w) sum += sums[w][v][from];
            const i64 column = top + from % 16, line = 4 * (from / 16) + v;
            if (line < m && column < n) {
                if (bias) {
                    u32 bits = ((const u16*)bias)[column];
                    sum += DTYPE == FB_BF16 ? bf16_to_float(bits) : f16_to_float(bits);
                }
                y[line * n + column] = (u16)(DTYPE == FB_BF16 ? float_to_bf16(sum) : float_to_f16(sum));
            }
        }
        block_barrier();  // before the next tile's sums
    }
}
