// The product: what lies in a block's shared memory, two rings and their barriers.
//
// One has tiles of x, of a step each. The other has the weight of a pair of steps: packed, and of each of its rows the
// values that a code can stand for, a table for each block of the weight in it.
#pragma once
#include "matmul_values.h"
#include "matmul_work.h"

#define THREADS (GROUP * 3)
#define X_BYTES (COLUMNS * STEP * 2)
#define PACKED_BYTES (OUTPUTS * STEP)                               // rows of 64 bytes
#define TABLES (BLOCKSIZE < 2 * STEP ? 2 * STEP / BLOCKSIZE : 1)    // of a row and pair
#define PLANE_BYTES (OUTPUTS * 16)                                  // of a table: low bytes of all rows, or high ones
#define TABLE_BYTES (2 * PLANE_BYTES)
#define WEIGHT_BYTES (PACKED_BYTES + TABLES * TABLE_BYTES)

// A row of a table.
FB_DEVICE void store_values(u32 to, const Values& v) {
    shared_store4(to, u32x4{v.low[0], v.low[1], v.low[2], v.low[3]});
    shared_store4(to + PLANE_BYTES, u32x4{v.high[0], v.high[1], v.high[2], v.high[3]});
}
FB_DEVICE void load_values(u32 from, Values& v) {
    const u32x4 low = shared_load4(from), high = shared_load4(from + PLANE_BYTES);
    v.low[0] = low.x, v.low[1] = low.y, v.low[2] = low.z, v.low[3] = low.w;
    v.high[0] = high.x, v.high[1] = high.y, v.high[2] = high.z, v.high[3] = high.w;
}

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

    // Full: the copy engine, and of the weight the four warps that make tables; empty: the eight that multiply.
    __device__ __forceinline__ void init() const {
        for (int i = 0; i < STAGES; ++i) barrier_init(x_full + 8 * i, 1), barrier_init(x_empty + 8 * i, 8);
        for (int i = 0; i < WEIGHT_STAGES; ++i) barrier_init(weight_full + 8 * i, 5), barrier_init(weight_empty + 8 * i, 8);
        barriers_made();
    }
};
