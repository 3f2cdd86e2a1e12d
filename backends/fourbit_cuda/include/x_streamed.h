// Where x comes from: it streams through shared memory as the weight does, a slice of all rows for the whole block.
#pragma once
#include "slice_mma.h"

struct X {
    const u16* x;
    i64 first;  // row
    u32 columns;
    Place start;

    __device__ __forceinline__ X(const Share& s, const u16* x, i64 first, u32 columns)
        : x(x), first(first), columns(columns) {}

    static __device__ __forceinline__ u32 sums_at(const Share& s, i64) { return s.x_ring; }
    static __device__ __forceinline__ void init(const Share&) {}

    __device__ __forceinline__ void fetch_once(const Share&) const {}
    __device__ __forceinline__ void fetch(const Share& s, u32 x_at, u32 slot) {
        const u32 to = s.x_ring + slot * X_BYTES, k = s.k;
        for (u32 i = s.thread; i < columns * (SLICE / 8); i += THREADS) {
            u32 m = i / (SLICE / 8), piece = i % (SLICE / 8);
            u32 at = x_at + piece * 8;
            copy16(to + m * X_STRIDE + piece * 16, x + (first + m) * k + (at < k ? at : 0), at < k ? 16 : 0);
        }
    }
    __device__ __forceinline__ void locate(const Share& s) { ::locate(start, s, s.x_ring, X_STRIDE, columns); }
    __device__ __forceinline__ void meet() const { block_barrier(); }
    __device__ __forceinline__ void place(Place& here, const Share&, u32, u32 slot) const {
        move(here, start, slot * X_BYTES);
    }
    __device__ __forceinline__ u32 wait(u32, u32) const { return 0; }
    __device__ __forceinline__ void release(const Share&, u32) const {}
    __device__ __forceinline__ void sums_read() const {}
};
