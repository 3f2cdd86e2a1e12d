// linear_vector: y = x · wᵀ (+ bias) for few rows of x, on the vector units of any device and with any wave size.
//
// A wave computes ROWS outputs for each of M rows of x. Its lanes lie along k, eight weights (one word) each; a table in
// shared memory turns a byte into two float32 values. The scale multiplies a block's float32 sum, not each weight.
// Defines: DTYPE, NESTED, M (rows of x at most), ROWS, COPIES (of the table, a power of two).
#include "packed.h"
#include "store.h"

#define THREADS 256
#define WAVES (THREADS / FB_WAVE)

struct __attribute__((aligned(8))) Pair {
    float first, second;
};

// Eight consecutive elements of x.
FB_DEVICE void load8(const void* x, i64 i, float (&v)[8]) {
#if DTYPE == FB_F32
    const u32x4* from = (const u32x4*)((const float*)x + i);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        u32x4 part = from[h];
        v[4 * h] = float_of(part.x), v[4 * h + 1] = float_of(part.y);
        v[4 * h + 2] = float_of(part.z), v[4 * h + 3] = float_of(part.w);
    }
#else
    u32x4 part = *(const u32x4*)((const u16*)x + i);
    const u32 words[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
    for (int h = 0; h < 4; ++h) {
#if DTYPE == FB_BF16
        v[2 * h] = float_of(words[h] << 16), v[2 * h + 1] = float_of(words[h] & 0xffff0000u);
#else
        v[2 * h] = f16_to_float(words[h] & 0xffffu), v[2 * h + 1] = f16_to_float(words[h] >> 16);
#endif
    }
#endif
}

FB_DEVICE float load1(const void* x, i64 i) {
#if DTYPE == FB_F32
    return ((const float*)x)[i];
#else
    u32 bits = ((const u16*)x)[i];
    return DTYPE == FB_BF16 ? bf16_to_float(bits) : f16_to_float(bits);
#endif
}

// x [m, k] and y [m, n] in DTYPE, 0 < m <= M, x 16-byte aligned; packed u8 [n, k / 2], 4-byte aligned; k a multiple of 8; bias [n]
// or null; blocks of 1 << shift elements.
FB_KERNEL(THREADS)
linear_vector(const void* x, const u8* packed, const void* absmax, const float* code, const float* nested_absmax,
              const float* nested_code, const float* nested_offset, const void* bias, void* y, i64 m, i64 n,
              i64 k, i64 shift) {
    __shared__ Pair table[256 * COPIES];
    for (u32 i = threadIdx.x; i < 256 * COPIES; i += THREADS) {
        u32 byte = i / COPIES;
        table[i] = Pair{code[byte >> 4], code[byte & 15]};
    }
    Scales scales = make_scales(absmax, nested_absmax, nested_code, nested_offset);
    block_barrier();

    const u32 lane = threadIdx.x % FB_WAVE, wave = threadIdx.x / FB_WAVE;
    const u32 last = per_lane((u32)m - 1);
    const Pair* mine = table + lane % COPIES;
    for (i64 tile = (i64)blockIdx.x * WAVES + wave; tile * ROWS < n; tile += (i64)gridDim.x * WAVES) {
        const i64 top = tile * ROWS;
        float sums[ROWS][M] = {};
        for (i64 at = 8 * lane; at < k; at += 8 * FB_WAVE) {
            float w[ROWS][8], scale[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                i64 row = top + r < n ? top + r : n - 1;  // past the end the last row again, not stored
                i64 element = row * k + at;
                u32 word = load_once((const u32*)(packed + (element >> 1)));
                scale[r] = scales(element >> shift);
#pragma unroll
                for (int b = 0; b < 4; ++b) {
                    Pair pair = mine[(word >> 8 * b & 255) * COPIES];
                    w[r][2 * b] = pair.first, w[r][2 * b + 1] = pair.second;
                }
            }
#pragma unroll
            for (int i = 0; i < M; ++i) {
                float v[8];
                load8(x, (i < last ? i : last) * k + at, v);  // past the end the last row again, not stored
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    float sum = w[r][0] * v[0];
#pragma unroll
                    for (int e = 1; e < 8; ++e) sum = __builtin_fmaf(w[r][e], v[e], sum);
                    sums[r][i] = __builtin_fmaf(scale[r], sum, sums[r][i]);
                }
            }
        }
        const u32 here = per_lane(lane);  // or a mask for each of the comparisons below would live through the loop
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int i = 0; i < M; ++i) {
                float sum = sums[r][i];
#pragma unroll
                for (int mask = FB_WAVE / 2; mask > 0; mask /= 2) sum += float_of(shuffle_xor(bits_of(sum), mask));
                if (here == (r * M + i) % FB_WAVE && i < m && top + r < n) {
                    if (bias) sum += load1(bias, top + r);
                    store1(y, i * n + top + r, sum);
                }
            }
    }
}
