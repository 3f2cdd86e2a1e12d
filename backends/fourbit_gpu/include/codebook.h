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
        if (thread < N) sorted[thread] = value = table[thread];
        if (thread == 0) ordered = 1;
        block_barrier();
        if (thread < N) {
#pragma unroll 16
            for (u32 j = 0; j < N; ++j) first &= j >= thread || sorted[j] != value;
            edges[thread] = first ? value : float_of(0x7fc00000u);  // for now the values; NaN compares false
        }
        u32 distinct = block_count(first);
        if (first) {
            u32 rank = 0;
#pragma unroll 16
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

// A shortcut through a 16-value codebook: [-1, 1] in 127 buckets, for each the number of edges in buckets below it.
// Where no bucket has two edges, one look-up and one comparison do for a search. 128 bytes lie in 32 banks, so the
// look-ups of a warp never conflict.
struct Buckets {
    u8 below[128];  // times four, as Codebook::search
    u32 crowded;    // whether a bucket has two edges: no shortcut then

    // The bucket of x, in the low bits of a float between 2^23 and 2^24. It rises with x, so edges in lower buckets
    // are below x, and those in higher ones above.
    static __device__ __forceinline__ u32 place(float x) { return bits_of(fma_rn(x, 63.0f, 8388671.0f)); }

    // Called by all threads of the block, at least 128; ends with a barrier.
    __device__ __forceinline__ void build(const Codebook<16>& codebook, u32 thread) {
        u32 lower = 0, inside = 0;
#pragma unroll
        for (int i = 0; i < 15; ++i) {
            float edge = codebook.edges[i];
            edge = edge < -2.0f ? -2.0f : edge > 2.0f ? 2.0f : edge;  // infinities, and tables beyond [-1, 1]
            u32 bucket = place(edge) - 0x4b000000u;
            lower += (int)bucket < (int)thread;
            inside += bucket == thread;
        }
        if (thread < 128) below[thread] = (u8)(4 * lower);
        crowded = 0;
        block_barrier();
        if (thread < 128 && inside > 1) crowded = 1;
        block_barrier();
    }

    // As Codebook::search, for |x| at most 1 (and a rounding error).
    __device__ __forceinline__ u32 search(const Codebook<16>& codebook, float x) const {
        u32 offset = below[place(x) - 0x4b000000u];
        return x > *(const float*)((const char*)codebook.edges + offset) ? offset + 4 : offset;
    }
};
