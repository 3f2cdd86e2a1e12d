// Where x comes from: all of the block's part of it lies in shared memory from the start. For few rows of x.
#pragma once
#include "slice_mma.h"

struct X {
    const u16* x;
    i64 first;  // row
    u32 columns, stride;
    Place start;

    __device__ __forceinline__ X(const Share& s, const u16* x, i64 first, u32 columns)
        : x(x), first(first), columns(columns), stride(stride_of(s)) {}

    static __device__ __forceinline__ u32 stride_of(const Share& s) { return 2 * s.steps * SLICE + X_PAD; }
    static __device__ __forceinline__ u32 sums_at(const Share& s, i64 rows_of_x) {
        return s.x_ring + stride_of(s) * (rows_of_x < COLUMNS ? (u32)rows_of_x : COLUMNS);
    }
    static __device__ __forceinline__ void init(const Share&) {}

    __device__ __forceinline__ void fetch_once(const Share& s) const {
        const u32 pieces = s.steps * (SLICE / 8), k = s.k;
        for (u32 m = 0; m < columns; ++m)
            for (u32 piece = s.thread; piece < pieces; piece += THREADS) {
                u32 at = s.k_first + piece * 8;
                copy16(s.x_ring + m * stride + piece * 16, x + (first + m) * k + (at < k ? at : 0), at < k ? 16 : 0);
            }
    }
    __device__ __forceinline__ void fetch(const Share&, u32, u32) {}
    __device__ __forceinline__ void locate(const Share& s) { ::locate(start, s, s.x_ring, stride, columns); }
    __device__ __forceinline__ void meet() const { wave_barrier(); }
    __device__ __forceinline__ void place(Place& here, const Share&, u32 step, u32) const {
        move(here, start, step * (2 * SLICE));
    }
    __device__ __forceinline__ u32 wait(u32, u32) const { return 0; }
    __device__ __forceinline__ void release(const Share&, u32) const {}
    __device__ __forceinline__ void sums_read() const {}
};
