// Which tiles a block works on: of 128 outputs (rows of the weight, or for the gradient its columns) and COLUMNS rows of x.
//
// Blocks take whole tiles in turn. Where at most 1 / SPLIT of the blocks would have one in the last turn, the SPLIT
// blocks of a cluster share each of those: every one multiplies a part of the inner dimension.
#pragma once
#include "warpgroup.h"

#include "experts.h"

#define OUTPUTS 128  // of a tile
#define STEP 64      // of the inner dimension, at a time
#define GROUP 128    // threads of a warpgroup
#define BAND 8       // tiles along x's rows that are worked on side by side, for the second-level cache

struct Tile {
    u32 x_row, columns;      // rows of x: the first, and how many are there
    u32 output, weight_row;  // the first output; the first row of the weight, or of the expert's
    u32 step, steps;         // of the inner dimension: the first, and how many
};

struct Problem {
    u32 rows, outputs, inner, n;  // of x; of the result; of both; rows of an expert's weight
    u32 experts, table;           // how many; where `plan_experts` put what it found
    u32 block, blocks;

    u32 tiles_across, tiles, whole;  // tiles along the outputs, in all, and of these those that no blocks share

    // `EVEN_STEPS`: where their number is odd, one more follows, all of zeros.
    __device__ __forceinline__ u32 steps() const {
        return EVEN_STEPS ? (inner + 2 * STEP - 1) / (2 * STEP) * 2 : (inner + STEP - 1) / STEP;
    }

    // After `plan_experts`.
    __device__ __forceinline__ Problem(u32 rows, u32 outputs, u32 inner, u32 n, u32 experts, u32 table)
        : rows(rows),
          outputs(outputs),
          inner(inner),
          n(n),
          experts(experts),
          table(table),
          block(blockIdx.x),
          blocks(gridDim.x) {
        tiles_across = (outputs + OUTPUTS - 1) / OUTPUTS;
        const u32 along = GROUPED ? shared_load(table + 4 * experts) : (rows + COLUMNS - 1) / COLUMNS;
        tiles = tiles_across * along;
        const u32 rest = tiles % blocks;
        whole = SPLIT > 1 && rest * SPLIT <= blocks ? tiles - rest : tiles;
    }

    // Whether the block's cluster shares a tile at the end.
    __device__ __forceinline__ bool shares() const { return SPLIT > 1 && whole + block / SPLIT < tiles; }

    // The place of tile `id`; all of its inner dimension.
    __device__ __forceinline__ Tile tile(u32 id) const {
        Tile t;
        t.step = 0, t.steps = steps(), t.weight_row = 0;
#if GROUPED
        u32 low = 0, high = experts;  // the expert: the last whose first tile is not behind `id`
        while (high - low > 1) {
            const u32 middle = (low + high) / 2;
            if (shared_load(table + 4 * middle) * tiles_across <= id) low = middle;
            else high = middle;
        }
        const u32 before = shared_load(table + 4 * low), along = shared_load(table + 4 * low + 4) - before;
        const u32 at = id - before * tiles_across;
        const u32 first = shared_load(table + 4 * (experts + 1 + low)), end = shared_load(table + 4 * (2 * experts + 1 + low));
        t.x_row = first + at % along * COLUMNS;
        t.output = at / along * OUTPUTS;
        t.weight_row = low * n;
        t.columns = end - t.x_row < COLUMNS ? end - t.x_row : COLUMNS;
#else
        const u32 along = (rows + COLUMNS - 1) / COLUMNS;
        const u32 band = id / (BAND * tiles_across), top = band * BAND;
        const u32 width = along - top < BAND ? along - top : BAND, at = id - top * tiles_across;
        t.x_row = (top + at % width) * COLUMNS;
        t.output = at / width * OUTPUTS;
        t.columns = rows - t.x_row < COLUMNS ? rows - t.x_row : COLUMNS;
#endif
        return t;
    }
};

// A block's tiles one after another; every warp goes through them by itself.
struct Work {
    u32 id;
    bool shared;  // whether the tile is one that the cluster shares

    __device__ __forceinline__ explicit Work(const Problem& p) : id(p.block), shared(false) {}

    // The next tile; false if there is none.
    __device__ __forceinline__ bool next(const Problem& p, Tile& tile) {
        if (!shared && id < p.whole) {
            tile = p.tile(id);
            id += p.blocks;
            return true;
        }
#if SPLIT > 1
        if (!shared) {
            shared = true;
            id = p.whole + p.block / SPLIT;
            if (p.shares()) {
                tile = p.tile(id);
                // in pairs of steps, which is how the weight comes
                const u32 rank = p.block % SPLIT, pairs = (tile.steps + 1) / 2;
                const u32 first = pairs * rank / SPLIT * 2, end = pairs * (rank + 1) / SPLIT * 2;
                tile.steps = (end < tile.steps ? end : tile.steps) - first;
                tile.step = first;
                return true;
            }
            id = ~0u;
        }
#endif
        return false;
    }
};

// A block's steps one after another, over all its tiles.
struct Steps {
    Work work;
    Tile tile;
    u32 step = 0, end = 0;  // of the tile

    __device__ __forceinline__ explicit Steps(const Problem& p) : work(p) {}

    // To the step `by` further on, or the next tile's first; false if there is none.
    __device__ __forceinline__ bool advance(const Problem& p, u32 by) {
        step += by;
        if (step < end) return true;
        step = end = 0;
        if (!work.next(p, tile)) return false;
        end = tile.steps;
        return true;
    }

    // The step's first element of the inner dimension.
    __device__ __forceinline__ u32 inner() const { return (tile.step + step) * STEP; }
};

#if GROUPED
// Of experts' rows, in shared memory: the number of tiles along x's rows before each expert [E + 1], the first row [E],
// and the end [E]; then where all end.
FB_DEVICE void plan_experts(u32 table, const Offsets& offsets, u32 experts, u32 rows, u32 thread) {
    if (thread < 32) {
        u32 tiles = 0, latest = 0;
        for (u32 base = 0; base < experts; base += 32) {
            const u32 e = base + thread;
            const ExpertRows of = rows_of_experts(offsets, base, experts, rows, thread, latest);
            const u32 first = of.first, end = of.end;
            u32 count = e < experts && end > first ? (end - first + COLUMNS - 1) / COLUMNS : 0, sum = count;
#pragma unroll
            for (u32 i = 1; i < 32; i *= 2) {
                const u32 other = __shfl_up_sync(0xffffffffu, sum, i);
                if (thread >= i) sum += other;
            }
            if (e < experts) {
                shared_store(table + 4 * e, tiles + sum - count);
                shared_store(table + 4 * (experts + 1 + e), first);
                shared_store(table + 4 * (2 * experts + 1 + e), end);
            }
            tiles += __shfl_sync(0xffffffffu, sum, 31);
        }
        if (thread == 0) shared_store(table + 4 * experts, tiles), shared_store(table + 4 * (3 * experts + 1), latest);
    }
}

// This block's part of the rows of y that no expert has.
FB_DEVICE void clear_rest(u16* y, const Problem& p, u32 thread, u32 threads) {
    clear_rest(y, shared_load(p.table + 4 * (3 * p.experts + 1)), p.rows, p.outputs, p.block, p.blocks, thread, threads);
}
#endif

#if SPLIT > 1
#define CLUSTER __cluster_dims__(SPLIT, 1, 1)  // of the blocks that share tiles
#else
#define CLUSTER
#endif

// Of a tile that a cluster shares, 32 rows of x at a time are added up, and have a barrier each: the sums' bytes count on it.
#define EXCHANGES (SPLIT > 1 ? COLUMNS / 32 : 0)
#define EXCHANGE_BYTES (4 * GROUP * 16)
FB_DEVICE u32 exchange_barrier(u32 shared, u32 i) { return shared + BARRIERS_AT + 16 * (STAGES + WEIGHT_STAGES) + 8 * i; }

// What a block does first, all of its threads; until it returns nothing is read that the launch before may write.
template <class R>
FB_DEVICE void begin(const R& rings, const TensorMap& x_map, const TensorMap& w_map, u32 shared, u32 thread,
                     const float* nested_code, const void* last, i64 rows, i64 experts, i64 wide) {
    if ((shared & 0xffffff) != SHARED_BASE) trap();
    if (thread == 0) {
        for (int i = 0; i < EXCHANGES; ++i) barrier_init(exchange_barrier(shared, i), 1);
        rings.init();
        for (int i = 0; i < EXCHANGES; ++i) barrier_expect(exchange_barrier(shared, i), EXCHANGE_BYTES);
    }
    if (thread == GROUP) prefetch_map(x_map), prefetch_map(w_map);
    after_previous();
    let_next_start();
#if GROUPED
    plan_experts(shared + EXPERTS_AT, Offsets{last, wide != 0}, (u32)experts, (u32)rows, thread);
#endif
#if NESTED
    if (thread < 256) shared_store(shared + CODES_AT + 4 * thread, bits_of(nested_code[thread]));
#endif
    block_barrier();
}
