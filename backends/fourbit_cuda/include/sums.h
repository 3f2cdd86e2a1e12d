// Results: the sums of warps that share rows, and of the cluster's blocks, added up in a fixed order.
#pragma once
#include "share.h"

// Puts a warp's sums where all can read them.
FB_DEVICE void store_sums(const Share& s, const float (&sums)[RT][NT][4], u32 sums_at, u32 columns) {
    const u32 g = s.lane / 4, t = s.lane % 4;
#pragma unroll
    for (int r = 0; r < RT; ++r)
#pragma unroll
        for (int i = 0; i < NT; ++i)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                u32 m = 8 * i + 2 * t + c % 2, row = s.wr * ROWS + 16 * r + 8 * (c / 2) + g;
                if (m < columns)
                    shared_store(sums_at + 4 * ((s.wk * COLUMNS + m) * SUM_STRIDE + row), bits_of(sums[r][i][c]));
            }
}

FB_DEVICE void sums_barrier() {
    if (SPLIT > 1) cluster_barrier();
    else block_barrier();
}

// y [first + m, p's rows] of `columns` rows of x; the cluster's blocks take turns. `bias`: null for none.
FB_DEVICE void write_results(const Share& s, u32 p, u32 sums_at, u32 columns, const u16* bias, u16* y, i64 first) {
    const u32 top = s.top(p), height = s.bottom(top) - top, count = columns * BLOCK_ROWS;
    for (u32 i = s.thread + s.rank * THREADS; i < count; i += SPLIT * THREADS) {
        u32 m = i / BLOCK_ROWS, row = i % BLOCK_ROWS;
        if (row >= height) continue;
        float sum = 0.0f;
#pragma unroll
        for (int block = 0; block < SPLIT; ++block)
#pragma unroll
            for (int j = 0; j < WK; ++j) {
                u32 from = sums_at + 4 * ((j * COLUMNS + m) * SUM_STRIDE + row);
                sum += SPLIT > 1 ? cluster_load(from, block) : float_of(shared_load(from));
            }
        u32 column = top + row;
        if (bias) {
            u32 bits = bias[column];
            sum += DTYPE == FB_BF16 ? bf16_to_float(bits) : f16_to_float(bits);
        }
        y[(first + m) * s.n + column] = (u16)(DTYPE == FB_BF16 ? float_to_bf16(sum) : float_to_f16(sum));
    }
}
