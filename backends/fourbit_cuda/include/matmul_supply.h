// The product: the warpgroup that fills both rings. It has the copy engine bring x and the packed weight; a thread adds
// what belongs to its row of the weight.
#pragma once
#if BYTEWISE
#include "matmul_bytes.h"
#else
#include "matmul_tables.h"
#endif

#define AHEAD (BYTEWISE ? 3 : BLOCKSIZE == 32 ? 2 : 1)  // fours of scales on their way

// Scales of four consecutive blocks of a row, or what they are to be looked up by.
struct Four {
#if NESTED
    u32 codes;
    float units[2];  // of the first block, and of the last
#else
    float scales[4];
#endif
};

// Those of one row of the weight.
struct RowScales {
    const ScaleSource& source;
    u32 first, count;
    bool aligned;  // fours

    __device__ __forceinline__ RowScales(const ScaleSource& source, u32 row, u32 blocks, bool inside, bool aligned)
        : source(source), first(row * blocks), count(inside ? blocks : 0), aligned(aligned) {}

    __device__ __forceinline__ Four ask(u32 index) const {
        const u32 at = first + 4 * index, left = 4 * index < count ? count - 4 * index : 0;
        Four four;
#if NESTED
        const u8* codes = (const u8*)source.absmax + at;
        four.codes = 0, four.units[0] = four.units[1] = 0.0f;
        if (left > 0) {
            if (aligned) {
                four.codes = *(const u32*)codes;
                four.units[0] = source.nested_absmax[at >> 8];
            } else {
#pragma unroll
                for (u32 i = 0; i < 4; ++i)
                    if (i < left) four.codes |= codes[i] << 8 * i;
                four.units[0] = source.nested_absmax[at >> 8];
                four.units[1] = source.nested_absmax[at + (left < 4 ? left : 4) - 1 >> 8];
            }
        }
#else
        const float* scales = (const float*)source.absmax + at;
        if (aligned) {
            u32x4 v = {0, 0, 0, 0};
            if (left > 0) v = *(const u32x4*)scales;
            four.scales[0] = float_of(v.x), four.scales[1] = float_of(v.y);
            four.scales[2] = float_of(v.z), four.scales[3] = float_of(v.w);
        } else {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) four.scales[i] = i < left ? scales[i] : 0.0f;
        }
#endif
        return four;
    }

    // The scale of block `i` of a pair of steps, whose first is `block`: one of `four`; behind the row's last, zero.
    __device__ __forceinline__ float get(const Four& four, u32 block, u32 i) const {
        const u32 at = BLOCKS == 4 ? i : BLOCKS == 2 ? block & 2 | i : block & 3;
        block += i;
#if NESTED
        if (block >= count) return 0.0f;
        const bool later = !aligned && first + block >> 8 != first + block / 4 * 4 >> 8;
        return source.nested(four.codes >> 8 * at & 255, later ? four.units[1] : four.units[0]);
#else
        const float low = at & 1 ? four.scales[1] : four.scales[0], high = at & 1 ? four.scales[3] : four.scales[2];
        return at & 2 ? high : low;
#endif
    }
};

// Has the copy engine bring x, a pair of steps at a time, as soon as they have been given back. One thread's.
struct XCopies {
    Steps steps;
    Place<STAGES> place;
    u32 by = 0;

    __device__ __forceinline__ explicit XCopies(const Problem& p) : steps(p) {}

    // False if there are no more.
    __device__ __forceinline__ bool pair(const Problem& p, const Rings& r, const TensorMap& map) {
        if (!steps.advance(p, by)) return false;
        by = 2;
        for (u32 i = 0; i < 2; ++i, place.next()) {
            const u32 full = r.x_full + 8 * place.at;
            barrier_wait(r.x_empty + 8 * place.at, place.parity ^ 1);
            barrier_expect(full, X_BYTES);
            copy_tile(r.x + place.at * X_BYTES, map, steps.inner() + i * STEP, steps.tile.x_row, full);
        }
        return true;
    }
};

FB_DEVICE void supply(const Problem& p, const Rings& r, const TensorMap& x_map, const TensorMap& w_map, const float* code,
                      const ScaleSource& scales, u32 thread, u32 k) {
    const bool first = thread % 32 == 0, copies_x = thread == 0, copies_weight = thread == 32;
    constexpr u32 in_front = STAGES / 2;  // pairs of steps of x
    XCopies x(p);
    if (copies_x)
        for (u32 i = 0; i < in_front; ++i) x.pair(p, r, x_map);
    auto copy_weight = [&](u32 at, const Tile& t, u32 step) {
        const u32 full = r.weight_full + 8 * at;
        barrier_expect(full, PACKED_BYTES);
        copy_tile(r.weight + at * WEIGHT_BYTES, w_map, step * STEP / 2, t.weight_row + t.output, full);
    };
    if (copies_weight) {  // all that there is room for, before the first scales are here
        Steps steps(p);
        for (u32 i = 0; i < WEIGHT_STAGES && steps.advance(p, i > 0 ? 2 : 0); ++i)
            copy_weight(i, steps.tile, steps.tile.step + steps.step);
    }
    __syncwarp();
    const BlockMaker maker(code);
    const u32 blocks = k / BLOCKSIZE;  // of a row
    const bool aligned = blocks % 4 == 0 && ((u64)scales.absmax & (NESTED ? 3 : 15)) == 0;
    Place<WEIGHT_STAGES> place;
    u32 again = 0;  // whether places have been filled before
    Work work(p);
    Tile t;
    while (work.next(p, t)) {
        const u32 row = t.output + thread;
        const RowScales mine(scales, t.weight_row + row, blocks, row < p.n, aligned);
        u32 step = t.step, index = step * STEP / BLOCKSIZE / 4;
        const u32 end = step + t.steps;
        Four fours[AHEAD + 1];  // the one at hand, and the next ones
#pragma unroll
        for (u32 i = 0; i < AHEAD; ++i) fours[i] = mine.ask(index + i);
#pragma unroll 1
        while (step < end) {
            fours[AHEAD] = mine.ask(index + AHEAD);
            const u32 last_step = (index + 1) * 4 * BLOCKSIZE / STEP, until = last_step < end ? last_step : end;
#pragma unroll 1
            for (; step < until; step += 2) {
                barrier_wait(r.weight_empty + 8 * place.at, place.parity ^ 1);
                again |= place.parity;
                if (copies_weight && again) copy_weight(place.at, t, step);
                __syncwarp();
                const u32 to = r.weight + place.at * WEIGHT_BYTES + PACKED_BYTES;
#pragma unroll
                for (u32 i = 0; i < BLOCKS; ++i)
                    maker.put(to + i * BLOCK_BYTES, thread, mine.get(fours[0], step * STEP / BLOCKSIZE, i));
                __syncwarp();
                barrier_arrive(r.weight_full + 8 * place.at, first);
                // what was in the place before has been multiplied, or soon will: its x goes, too
                if (copies_x && again) x.pair(p, r, x_map);
                __syncwarp();
                place.next();
            }
#pragma unroll
            for (u32 i = 0; i < AHEAD; ++i) fours[i] = fours[i + 1];
            ++index;
        }
    }
    if (copies_x)
        while (x.pair(p, r, x_map)) {
        }
    __syncwarp();
}
