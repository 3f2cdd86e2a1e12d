// The gradient: what lies in a block's shared memory, the rings and their barriers, and who has the copy engine fill them.
#pragma once
#include "matmul_work.h"

#define THREADS (GROUP * (2 + DECODERS))
#define X_BYTES (COLUMNS * STEP * 2)
#define A_BYTES (OUTPUTS * STEP * 2)
#define STAGE_BYTES (X_BYTES + A_BYTES)
#define WEIGHT_BYTES (OUTPUTS * STEP)  // of a pair of steps

struct Ring {
    u32 ring, full, empty, weight, weight_full, weight_empty;

    __device__ __forceinline__ explicit Ring(u32 shared)
        : ring(shared),
          full(shared + BARRIERS_AT),
          empty(full + 8 * STAGES),
          weight(shared + WEIGHT_AT),
          weight_full(empty + 8 * STAGES),
          weight_empty(weight_full + 8 * WEIGHT_STAGES) {}

    __device__ __forceinline__ void init() const {
        for (int i = 0; i < STAGES; ++i) barrier_init(full + 8 * i, 5), barrier_init(empty + 8 * i, 8);
        for (int i = 0; i < WEIGHT_STAGES; ++i) {
            barrier_init(weight_full + 8 * i, 1);
            barrier_init(weight_empty + 8 * i, 4 * DECODERS);
        }
        barriers_made();
    }
};

// Has the copy engine bring tiles of x, or of the packed weight, one after another. One thread's.
struct Fetcher {
    Steps steps;
    u32 count = 0;

    __device__ __forceinline__ explicit Fetcher(const Problem& p) : steps(p) {}

    // Waits until all have given back the place.
    __device__ __forceinline__ void fetch_x(const Problem& p, const Ring& r, const TensorMap& map) {
        if (!steps.advance(p, count > 0)) return;
        const u32 slot = count % STAGES, full = r.full + 8 * slot;
        barrier_wait(r.empty + 8 * slot, count / STAGES & 1 ^ 1);
        barrier_expect(full, X_BYTES);
        copy_tile(r.ring + slot * STAGE_BYTES, map, steps.inner(), steps.tile.x_row, full);
        ++count;
    }

    // The packed weight of a pair of steps; likewise.
    __device__ __forceinline__ void fetch_weight(const Problem& p, const Ring& r, const TensorMap& map) {
        if (!steps.advance(p, count > 0 ? 2 : 0)) return;
        const u32 slot = count % WEIGHT_STAGES, full = r.weight_full + 8 * slot, to = r.weight + slot * WEIGHT_BYTES;
        barrier_wait(r.weight_empty + 8 * slot, count / WEIGHT_STAGES & 1 ^ 1);
        barrier_expect(full, WEIGHT_BYTES);
        copy_tile(to, map, steps.tile.output / 2, steps.tile.weight_row + steps.inner(), full);
        ++count;
    }
};
