// What one block has of the product: rows of the weight, in passes, and a part of their K; its rows of x.
#pragma once
#include "ring.h"

#include "experts.h"

#if SPLIT > 1
#define CLUSTER __cluster_dims__(SPLIT, 1, 1)  // of the blocks that share rows
#else
#define CLUSTER
#endif

FB_DEVICE u32 window_of(const u8* shared) {
    const u32 base = shared_address(shared), window = base & 0xff000000u;
    if (base - window != SHARED_BASE) trap();  // matrix.h would be wrong about this device
    return window;
}

// Indices of thread and block come from the kernel: there the compiler knows their bounds.
struct Share {
    u32 thread, lane, warp, wr, wk;  // this thread's place; of its warp: over the rows, and over K
    u32 window, lane4, x_ring;       // of shared memory; with four times the lane; where x lies
    u32 n, k, pass;                  // rows of the weight, elements of one, rows of a pass
    u32 rank, k_first, steps;        // in the cluster; of K: the first element, and how many slices
    u32 row_first, row_end;

    __device__ __forceinline__ Share(u32 window_, u32 thread_, u32 block, i64 n_, i64 k_, i64 range_, i64 pass_) {
        window = window_, thread = thread_, lane = thread % 32, warp = same_in_wave(thread / 32);
        wr = warp % WR, wk = warp / WR;
        lane4 = window | 4 * lane, x_ring = window + X_AT;
        n = (u32)n_, k = (u32)k_, pass = (u32)pass_;
        const u32 range = (u32)range_;
        rank = SPLIT > 1 ? block % SPLIT : 0;
        const u32 steps_in_all = (k + SLICE - 1) / SLICE, first_step = steps_in_all * rank / SPLIT;
        steps = steps_in_all * (rank + 1) / SPLIT - first_step;
        k_first = first_step * SLICE;
        row_first = block / SPLIT * range;
        row_end = row_first + range < n ? row_first + range : n;
    }

    __device__ __forceinline__ u32 passes() const { return (row_end - row_first + pass - 1) / pass; }

    // The first row of pass p, and where a pass that starts there ends.
    __device__ __forceinline__ u32 top(u32 p) const { return row_first + p * pass; }
    __device__ __forceinline__ u32 bottom(u32 top) const { return top + pass < row_end ? top + pass : row_end; }
};

// Rows of x: COLUMNS of them, or those of an expert, whose rows of the weight start with `weight`.
struct Rows {
    i64 first, end;
    u32 weight;
};
FB_DEVICE Rows rows_of_block(u32 block, i64 rows_of_x) {
    const i64 first = (i64)block * COLUMNS;
    return Rows{first, first + COLUMNS < rows_of_x ? first + COLUMNS : rows_of_x, 0};
}
// Of the `slot`-th expert that has any; none where there are no more such.
FB_DEVICE Rows rows_of_expert(u32 slot, i64 rows_of_x, const Offsets& offsets, u32 experts, u32 n, u32 lane) {
    u32 latest = 0;
    for (u32 base = 0; base < experts; base += 32) {
        const ExpertRows of = rows_of_experts(offsets, base, experts, (u32)rows_of_x, lane, latest);
        const bool any = of.end > of.first;
        const u32 busy = __ballot_sync(0xffffffffu, any), count = __popc(busy);
        if (slot < count) {
            const bool chosen = any && __popc(busy & (1u << lane) - 1) == slot;
            const u32 at = __ffs(__ballot_sync(0xffffffffu, chosen)) - 1;
            return Rows{__shfl_sync(0xffffffffu, of.first, at), __shfl_sync(0xffffffffu, of.end, at), (base + at) * n};
        }
        slot -= count;
    }
    return Rows{0, 0, 0};
}
// What no expert has is a zero: this block's part of it.
FB_DEVICE void clear_rest(u16* y, i64 rows_of_x, const Offsets& offsets, u32 experts, u32 n, u32 thread) {
    u32 latest = 0;
    for (u32 base = 0; base < experts; base += 32)
        rows_of_experts(offsets, base, experts, (u32)rows_of_x, thread % 32, latest);
    clear_rest(y, latest, (u32)rows_of_x, n, blockIdx.y * gridDim.x + blockIdx.x, gridDim.x * gridDim.y, thread, THREADS);
}

// Has the cache ask for what the first slots of the ring will hold: while the launch before still runs.
FB_DEVICE void prefetch_first(const Share& s, const u8* packed, const float* code) {
    if (s.thread == 0) prefetch_line(code);
    for (u32 r = s.row_first + s.thread / 4; r < s.row_first + s.pass && r < s.row_end; r += THREADS / 4) {
#pragma unroll
        for (u32 i = 0; i < (WGMMA ? STAGES - 1 : 1); ++i) {
            u32 at = s.k_first + (4 * i + s.thread % 4) * (SLICE / 4);
            if (at + SLICE / 4 <= s.k) prefetch(packed + (u64)r * (s.k / 2) + at / 2, SLICE / 8);
        }
    }
}
