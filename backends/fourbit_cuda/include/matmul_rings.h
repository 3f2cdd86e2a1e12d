// The product: what lies in a block's shared memory, two rings and their barriers.
//
// One has tiles of x, of a step each. The other has the weight of a pair of steps: packed, and of each block of it in each
// row what the warps that multiply need beside its codes: see matmul_bytes.h and matmul_tables.h.
#pragma once
#include "matmul_values.h"
#include "matmul_work.h"

#define THREADS (GROUP * 3)
#define X_BYTES (COLUMNS * STEP * 2)
#define PACKED_BYTES (OUTPUTS * STEP)                             // rows of 64 bytes
#define BLOCKS (BLOCKSIZE < 2 * STEP ? 2 * STEP / BLOCKSIZE : 1)  // of a row and pair
#if BYTEWISE
#define BLOCK_BYTES (OUTPUTS * 4)  // a scale for each row
#else
#define PLANE_BYTES (OUTPUTS * 16)  // of tables: low bytes of all rows, or high ones
#define BLOCK_BYTES (2 * PLANE_BYTES)
#endif
#define WEIGHT_BYTES (PACKED_BYTES + BLOCKS * BLOCK_BYTES)

// A place in a ring of `count`, and the parity of its phase.
template <u32 count>
struct Place {
    u32 at = 0, parity = 0;

    __device__ __forceinline__ void next() {
        if (++at == count) at = 0, parity ^= 1;
    }
};

struct Rings {
    u32 x, x_full, x_empty, weight, weight_full, weight_empty;

    __device__ __forceinline__ explicit Rings(u32 shared)
        : x(shared),
          x_full(shared + BARRIERS_AT),
          x_empty(x_full + 8 * STAGES),
          weight(shared + WEIGHT_AT),
          weight_full(x_empty + 8 * STAGES),
          weight_empty(weight_full + 8 * WEIGHT_STAGES) {}

    // Full: the copy engine, and of the weight the four warps that fill it; empty: the eight that multiply.
    __device__ __forceinline__ void init() const {
        for (int i = 0; i < STAGES; ++i) barrier_init(x_full + 8 * i, 1), barrier_init(x_empty + 8 * i, 8);
        for (int i = 0; i < WEIGHT_STAGES; ++i) barrier_init(weight_full + 8 * i, 5), barrier_init(weight_empty + 8 * i, 8);
        barriers_made();
    }
};
