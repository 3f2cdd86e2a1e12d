// "Nearest entry", as fourbit.codebooks.thresholds defines it, for a table in any order that may hold a value twice.
#pragma once
#include "shim.h"

// The midpoints of a table's neighbouring values, and the code of each value, in shared memory.
template <int N>
struct Codebook {
    float edges[N];  // N - 1 of them at most; infinity from the last on, so that a search never passes it
    float sorted[N];
    u32 codes[N];
    u32 ordered;  // whether codes[i] == i, as in NF4

    // Called by all threads of the block, at least N; ends with a barrier.
    __device__ __forceinline__ void build(const float* table, u32 thread) {
        // a value that occurs again is left out: the lowest code stands for it, and +0 equals -0
        bool first = thread < N;
        float value = 0.0f;
        if (thread < N) {
            value = table[thread];
            for (u32 j = 0; j < thread; ++j) first &= table[j] != value;
            edges[thread] = first ? value : float_of(0x7fc00000u);  // for now the values; NaN compares false
        }
        if (thread == 0) ordered = 1;
        u32 distinct = block_count(first);
        if (first) {
            u32 rank = 0;
            for (u32 j = 0; j < N; ++j) rank += edges[j] < value;
            sorted[rank] = value;
            codes[rank] = thread;
            if (rank != thread) ordered = 0;
        }
        block_barrier();
        if (thread < N) {
            bool inside = thread + 1 < distinct;
            edges[thread] = inside ? mul_rn(add_rn(sorted[thread], sorted[thread + 1]), 0.5f) : float_of(0x7f800000u);
        }
        block_barrier();
    }

    // Four times the number of edges below x: the byte offset into `codes` of the entry nearest to x.
    __device__ __forceinline__ u32 search(float x) const {
        const char* base = (const char*)edges;
        u32 offset = 0;
#pragma unroll
        for (u32 step = N / 2; step >= 1; step /= 2) {
            float edge = *(const float*)(base + offset + 4 * (step - 1));
            if (x > edge) offset += 4 * step;
        }
        return offset;
    }

    __device__ __forceinline__ u32 code(u32 offset) const { return *(const u32*)((const char*)codes + offset); }
};
