// Where x comes from: the copy engine brings it slice by slice, as arrange_x.cu laid it out, and wgmma reads it.
//
// Each slot has two barriers: "full", when the bytes have come, and "free", when all warps are done with it.
#pragma once
#include "slice_wgmma.h"

struct X {
    const u16* x;
    i64 first;  // row
    u32 ring, barriers;
    u32 freed = 0, fetcher = 0, used = 0;  // parities of the free barriers; whose turn it is; slots filled before

    __device__ __forceinline__ X(const Share& s, const u16* x, i64 first, u32)
        : x(x), first(first), ring(s.window + X_AT), barriers(s.window + BARRIERS_AT) {}

    static __device__ __forceinline__ u32 sums_at(const Share& s, i64) { return s.window + X_AT; }
    static __device__ __forceinline__ void init(const Share& s) {
        if (s.thread == 0) {
            const u32 barriers = s.window + BARRIERS_AT;
#pragma unroll
            for (int i = 0; i < STAGES; ++i) {
                barrier_init(barriers + 8 * i, 1);
                barrier_init(barriers + 8 * (STAGES + i), WARPS);
            }
            async_fence();
        }
    }

    __device__ __forceinline__ void fetch_once(const Share&) const {}
    __device__ __forceinline__ void fetch(const Share& s, u32 x_at, u32 slot) {
        const bool again = used >> slot & 1;
        if (s.warp == fetcher && s.lane == 0) {
            if (again) barrier_wait(barriers + 8 * (STAGES + slot), freed >> slot & 1);
            const u32 end = (s.k + KW - 1) / KW * KW;  // padded with zeros
            u32 bytes = (end - x_at < SLICE ? end - x_at : SLICE) * (2 * COLUMNS);
            copy_bulk(ring + slot * X_BYTES, x + (first * end + (u64)x_at * COLUMNS), bytes, barriers + 8 * slot);
        }
        freed ^= (u32)again << slot;
        used |= 1u << slot;
    }
    __device__ __forceinline__ void locate(const Share&) const {}
    __device__ __forceinline__ void meet() const { wave_barrier(); }
    __device__ __forceinline__ void place(Place& here, const Share& s, u32, u32 slot) const {
        here = ring + slot * X_BYTES + s.wk * (KW * 2 * COLUMNS);
    }
    __device__ __forceinline__ u32 wait(u32 slot, u32 parity) {
        fetcher = fetcher + 1 == WARPS ? 0 : fetcher + 1;  // it waits for the others: by turns
        barrier_wait(barriers + 8 * slot, parity >> slot & 1);
        return 1u << slot;
    }
    __device__ __forceinline__ void release(const Share& s, u32 slot) const {
        wave_barrier();
        if (s.lane == 0) barrier_arrive(barriers + 8 * (STAGES + slot));
    }
    __device__ __forceinline__ void sums_read() const {
        async_fence();
        block_barrier();
    }
};
