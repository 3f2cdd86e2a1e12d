// linear_4bit for many rows of x, and its gradient: y [M, N] = x [M, K] times the transposed weight [N, K], plus bias
// [N]; with TRANSPOSED y [M, K] = x [M, N] times the weight. For sm_90a: wgmma with both operands in shared memory.
//
// One or two warpgroups (DECODERS; they take turns) decode the weight, step by step of 64 of the inner dimension, into
// tiles of 128 outputs x 64 of 16-bit values; two others multiply them by tiles of x. The copy engine brings tiles of x
// and, for a pair of steps at a time, of the packed weight. A ring of STAGES (x tile, decoded tile) lies between: "full"
// barriers count the copy and the decoding group's four warps, "empty" ones the eight warps that multiply. The packed
// weight has a ring and barriers of its own.
//
// Defines: DTYPE, BLOCKSIZE, NESTED, TRANSPOSED, GROUPED, COLUMNS (rows of x in a tile: 64, 128 or 256), DECODERS, SPLIT (blocks
// of a cluster, which share the last tiles), STAGES, WEIGHT_STAGES, RESULT_COLUMNS (of results on their way out at a
// time), and those of `Memory` in matmul.py: *_AT.
#define A_TRANSPOSED TRANSPOSED
#include "matmul_decode.h"

#define GROUP 128  // threads of a warpgroup
#define THREADS (GROUP * (2 + DECODERS))
#define X_BYTES (COLUMNS * STEP * 2)
#define A_BYTES (OUTPUTS * STEP * 2)
#define STAGE_BYTES (X_BYTES + A_BYTES)
#define WEIGHT_BYTES (OUTPUTS * STEP)  // of a pair of steps
#define RESULT_BYTES (RESULT_COLUMNS * 128)
#define NT (COLUMNS / 8)
#define SLICES (SPLIT > 2 ? SPLIT / 2 : 1)
#define PART (SPLIT > 1 ? NT / SLICES : NT)  // of those, what a block of a cluster finishes for one warpgroup

#if SPLIT > 1
#define CLUSTER __cluster_dims__(SPLIT, 1, 1)
#else
#define CLUSTER
#endif

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
        for (int i = 0; i < WEIGHT_STAGES; ++i) barrier_init(weight_full + 8 * i, 1), barrier_init(weight_empty + 8 * i, DECODERS == 1 ? 4 : 8);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        async_fence();
    }
};

// Has the copy engine bring tiles of x, or of the packed weight, one after another. One thread's.
struct Fetcher {
    Work work;
    Tile tile;
    u32 step = 0, end = 0, count = 0;
    bool more = true;

    __device__ __forceinline__ explicit Fetcher(const Problem& p) : work(p) {}

    // Whether there is one more, after `by` steps.
    __device__ __forceinline__ bool advance(const Problem& p, u32 by) {
        step += by;
        if (step < end) return true;
        step = end = 0;
        if (!work.next(p, tile)) return false;
        end = tile.steps;
        return true;
    }

    // The place must have been given back by all.
    __device__ __forceinline__ void fetch_x(const Problem& p, const Ring& r, const TensorMap& map) {
        if (!advance(p, count > 0)) return;
        const u32 slot = count % STAGES, full = r.full + 8 * slot;
        barrier_wait(r.empty + 8 * slot, count / STAGES & 1 ^ 1);
        barrier_expect(full, X_BYTES);
        copy_tile(r.ring + slot * STAGE_BYTES, map, (tile.step + step) * STEP, tile.x_row, full);
        ++count;
    }

    // The packed weight, by pairs of steps: as many as there is room for, at least up to pair `needed`.
    __device__ __forceinline__ void fetch_weight(const Problem& p, const Ring& r, const TensorMap& map, u32 needed) {
        while (more) {
            const u32 slot = count % WEIGHT_STAGES, turn = count / WEIGHT_STAGES & 1 ^ 1;
            if (count > needed && !barrier_passed(r.weight_empty + 8 * slot, turn)) return;
            if (!advance(p, count > 0 ? 2 : 0)) {
                more = false;
                return;
            }
            const u32 full = r.weight_full + 8 * slot, to = r.weight + slot * WEIGHT_BYTES;
            barrier_wait(r.weight_empty + 8 * slot, turn);
            barrier_expect(full, WEIGHT_BYTES);
            const u32 inner = (tile.step + step) * STEP;
            if (TRANSPOSED) copy_tile(to, map, tile.output / 2, tile.weight_row + inner, full);
            else copy_tile(to, map, inner / 2, tile.weight_row + tile.output, full);
            ++count;
        }
    }
};

// What decoders do; `group`: which of the DECODERS warpgroups. Several take the steps in turn, one all of a pair.
FB_DEVICE void decode_tiles(const Problem& p, const Ring& r, const TensorMap& map, const float* code_,
                            const ScaleSource& scales, u32 group, u32 thread, u32 k) {
    constexpr u32 mine = DECODERS == 1 ? 2 : 1;  // steps of a pair
    const bool first = thread % 32 == 0, fetches = group == 0 && thread == 32;
    float code[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) code[i] = code_[i];
    Fetcher fetcher(p);
    u32 base = 0, pair_base = 0;  // steps and pairs of the tiles before
    Work work(p);
    Tile t;
    while (work.next(p, t)) {
        const Place64 place(t, thread, p.n, k);
        Scale next[mine][BLOCKS];
        auto ask = [&](u32 step) {
#pragma unroll
            for (u32 h = 0; h < mine; ++h)
#pragma unroll
                for (u32 b = 0; b < BLOCKS; ++b)
                    next[h][b] = scales.ask(place.block(step + h, k) + b, place.there(t, step + h, p.n));
        };
        ask(group);
        const u32 pairs = (t.steps + 1) / 2;  // of the last of which only a step may be there
#pragma unroll 1
        for (u32 step = group; step < 2 * pairs; step += mine * DECODERS) {
            float scale[mine][BLOCKS];
#pragma unroll
            for (u32 h = 0; h < mine; ++h)
#pragma unroll
                for (u32 b = 0; b < BLOCKS; ++b) scale[h][b] = scales.get(next[h][b], place.there(t, step + h, p.n));
            ask(step + mine * DECODERS);
            const u32 pair = pair_base + step / 2, slot = pair % WEIGHT_STAGES;
            if (fetches) fetcher.fetch_weight(p, r, map, pair);
            __syncwarp();
            barrier_wait(r.weight_full + 8 * slot, pair / WEIGHT_STAGES & 1);
            u32x4 words[mine][2];
#pragma unroll
            for (u32 h = 0; h < mine; ++h)
#pragma unroll
                for (u32 i = 0; i < 2; ++i)
                    words[h][i] = shared_load4(r.weight + slot * WEIGHT_BYTES + place.piece(DECODERS == 1 ? h : step % 2, i));
            __syncwarp();
            if (first) barrier_arrive(r.weight_empty + 8 * slot);
#pragma unroll
            for (u32 h = 0; h < mine; ++h) {
                if (step + h >= t.steps) break;
                const u32 it = base + step + h, stage = it % STAGES;
                Values values;
                values.build(code, scale[h][0]);
                barrier_wait(r.empty + 8 * stage, it / STAGES & 1 ^ 1);
                const u32 to = r.ring + stage * STAGE_BYTES + X_BYTES + thread * 128 | (thread & 7) << 4;
#pragma unroll
                for (u32 i = 0; i < 2; ++i) {
                    if (i == 1 && BLOCKS == 2) values.build(code, scale[h][BLOCKS - 1]);
                    const u32x4& w = words[h][i];
                    u32x4 a, b;
                    values.decode(w.x, w.y, a, b);
                    shared_store4(to ^ (4 * i + 0) << 4, a);
                    shared_store4(to ^ (4 * i + 1) << 4, b);
                    values.decode(w.z, w.w, a, b);
                    shared_store4(to ^ (4 * i + 2) << 4, a);
                    shared_store4(to ^ (4 * i + 3) << 4, b);
                }
                async_fence();  // the tensor cores read it
                __syncwarp();
                if (first) barrier_arrive(r.full + 8 * stage);
            }
        }
        base += t.steps, pair_base += pairs;
    }
}

// Writes COUNT blocks of eight rows of x, from block `first` on, of a warpgroup's 64 outputs.
template <int COUNT>
FB_DEVICE void write_results(const float (&sums)[NT][4], const int first, u32 buffer, const Tile& t, u32 group,
                             u32 thread, const u16* bias, u16* y, u32 width) {
    const u32 lane = thread % 32, warp = thread / 32;
    const u32 output = t.output + group * 64;
    float add[2] = {0.0f, 0.0f};
    if (!GROUPED && bias) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32 at = output + warp * 16 + lane / 4 + 8 * i;
            const u32 bits = at < width ? bias[at] : 0;
            add[i] = DTYPE == FB_BF16 ? bf16_to_float(bits) : f16_to_float(bits);
        }
    }
    constexpr int at_a_time = COUNT < RESULT_COLUMNS / 8 ? COUNT : RESULT_COLUMNS / 8;
    const u32 place = lane % 8 + lane / 16 * 8, piece = 2 * warp + (lane >> 3 & 1);
    const u32 to = buffer + place * 128 + ((piece ^ lane & 7) << 4);
    const bool whole = width % 8 == 0;
#pragma unroll
    for (int i = 0; i < COUNT; i += at_a_time) {
        group_barrier(1 + group);  // the buffer may still be read from
#pragma unroll
        for (int j = 0; j < at_a_time; j += 2) {
            u32 v[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const float(&d)[4] = sums[first + i + j + c / 2];
                const float low = d[c % 2 * 2] + add[c % 2], high = d[c % 2 * 2 + 1] + add[c % 2];
                v[c] = DTYPE == FB_BF16 ? floats_to_bf16x2(low, high) : floats_to_f16x2(low, high);
            }
            store_transposed(to + j * 1024, v[0], v[1], v[2], v[3]);
        }
        group_barrier(1 + group);
        for (u32 at = thread; at < at_a_time * 64; at += GROUP) {
            const u32 row = at / 8, part = at % 8, m = (first + i) * 8 + row, column = output + part * 8;
            if (m >= t.columns) break;
            const u32x4 v = shared_load4(buffer + row * 128 + ((part ^ row & 7) << 4));
            u16* out = y + (u64)(t.x_row + m) * width + column;
            if (whole) {
                if (column < width) *(u32x4*)out = v;
            } else {
                const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int e = 0; e < 8; ++e)
                    if (column + e < width) out[e] = (u16)(words[e / 2] >> 16 * (e % 2));
            }
        }
    }
}

#if SPLIT > 1
// d += the other blocks' sums, of which that of block `from` lies at `at` + from * PART * GROUP * 16; whichever block adds
// them, the result is the same.
FB_DEVICE void add_others(float (&d)[4], u32 at, u32 rank) {
    const float own[4] = {d[0], d[1], d[2], d[3]};
#pragma unroll
    for (u32 from = 0; from < (SPLIT == 2 ? 1 : SPLIT); ++from) {  // two sums can be added in either order
        const u32x4 v = shared_load4(at + (SPLIT == 2 ? 1 - rank : from) * (PART * GROUP * 16));
        const float other[4] = {float_of(v.x), float_of(v.y), float_of(v.z), float_of(v.w)};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            if (SPLIT == 2) d[c] = own[c] + other[c];
            else d[c] = (from > 0 ? d[c] : 0.0f) + (from == rank ? own[c] : other[c]);
            asm volatile("" : "+f"(d[c]));  // one after another, as registers allow
        }
    }
}
#endif

// What the other two warpgroups do.
FB_DEVICE void multiply_tiles(const Problem& p, const Ring& r, const TensorMap& map, u32 shared, u32 group, u32 thread,
                              const u16* bias, u16* y) {
    const u32 lane = thread % 32;
    const bool fetches = group == 0 && thread == 0;
    Fetcher fetcher(p);
    if (fetches)
        for (int i = 0; i < STAGES; ++i) fetcher.fetch_x(p, r, map);
    __syncwarp();
    const u32 buffer = shared + RESULTS_AT + group * RESULT_BYTES;
    u32 base = 0;
    Work work(p);
    Tile t;
    while (work.next(p, t)) {
        float sums[NT][4];
#pragma unroll 1
        for (u32 step = 0; step < t.steps; ++step) {
            const u32 it = base + step, stage = it % STAGES;
            barrier_wait(r.full + 8 * stage, it / STAGES & 1);
            const u32 x = r.ring + stage * STAGE_BYTES;
            const u64 x_at = operand_rows(x), a_at = operand_rows(x + X_BYTES + group * 8192);
            products_fence();
#pragma unroll
            for (int i = 0; i < 4; ++i)
                start_product(sums, a_at + i * (TRANSPOSED ? 128 : 2), x_at + i * 2, step + i);
            products_commit();
            products_wait<1>();
            if (step > 0) {
                if (lane == 0) barrier_arrive(r.empty + 8 * ((it - 1) % STAGES));
                if (fetches) fetcher.fetch_x(p, r, map);
                __syncwarp();
            }
        }
        products_wait<0>();
        base += t.steps;
        if (lane == 0) barrier_arrive(r.empty + 8 * ((base - 1) % STAGES));
        if (fetches) fetcher.fetch_x(p, r, map);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < NT; ++i)
#pragma unroll
            for (int c = 0; c < 4; ++c) asm volatile("" : "+f"(sums[i][c])::"memory");
#if SPLIT > 1
        if (work.shared) {
            // each block finishes a warpgroup's outputs for a slice of the rows of x: it gets the others' sums of these
            const u32 rank = p.block % SPLIT;
            const u32 mine = r.ring + thread * 16;
            __syncwarp();
            cluster_barrier();  // nobody needs the ring any more
#pragma unroll
            for (u32 slice = 0; slice < SLICES; ++slice) {
                const u32 owner = 2 * slice + group;
                if (owner == rank) continue;
                const u32 to = cluster_address(mine + rank * (PART * GROUP * 16), owner);
#pragma unroll
                for (u32 i = 0; i < PART; ++i) {
                    const float(&d)[4] = sums[slice * PART + i];
                    cluster_store4(to + i * (GROUP * 16), u32x4{bits_of(d[0]), bits_of(d[1]), bits_of(d[2]), bits_of(d[3])});
                }
            }
            __syncwarp();
            cluster_barrier();
            if (group != rank % 2) continue;
#pragma unroll
            for (u32 slice = 0; slice < SLICES; ++slice) {
                if (slice != rank / 2) continue;
#pragma unroll
                for (u32 i = 0; i < PART; ++i) {
                    float(&d)[4] = sums[slice * PART + i];
                    add_others(d, mine + i * (GROUP * 16), rank);
                }
                write_results<PART>(sums, slice * PART, buffer, t, group, thread, bias, y, p.outputs);
            }
            continue;
        }
#endif
        write_results<NT>(sums, 0, buffer, t, group, thread, bias, y, p.outputs);
    }
}

// x [rows, inner] and y [rows, outputs] in DTYPE, of which x_map describes x in boxes of 64 x COLUMNS; w_map packed u8
// [E * N, K / 2] in boxes of 64 bytes x 128 rows; `last`: bias [N] or null, with GROUPED int64 offsets [E], with
// `experts` E. K is a multiple of 64 and of BLOCKSIZE.
extern "C" __global__ void __launch_bounds__(THREADS, 1) CLUSTER
    matmul(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const void* absmax,
           const float* code, const float* nested_absmax, const float* nested_code, const float* nested_offset,
           const void* last, u16* y, i64 rows, i64 n, i64 k, i64 experts) {
    extern __shared__ __align__(1024) u8 shared_[];
    const u32 shared = shared_address(shared_);
    if (shared & 1023) trap();
    const u32 thread = threadIdx.x, role = same_in_wave(thread / GROUP);
    const Ring ring(shared);
    if (thread == 0) ring.init();
    if (thread == GROUP) prefetch_map(x_map), prefetch_map(w_map);
    after_previous();
    let_next_start();
#if GROUPED
    plan_experts(shared + EXPERTS_AT, (const i64*)last, (u32)experts, (u32)rows, thread);
#endif
#if NESTED
    if (thread < 256) shared_store(shared + CODES_AT + 4 * thread, bits_of(nested_code[thread]));
#endif
    block_barrier();

    Problem p;
    p.rows = (u32)rows, p.n = (u32)n, p.experts = (u32)experts, p.table = shared + EXPERTS_AT;
    p.outputs = (u32)(TRANSPOSED ? k : n), p.inner = (u32)(TRANSPOSED ? n : k);
    p.block = blockIdx.x, p.blocks = gridDim.x;
    p.count_tiles();

    if (role >= 2) {
        registers_decrease<DECODER_REGISTERS>();
        const ScaleSource scales = {absmax, nested_absmax, shared + CODES_AT, NESTED ? *nested_offset : 0.0f};
        decode_tiles(p, ring, w_map, code, scales, role - 2, thread % GROUP, (u32)k);
#if SPLIT > 1
        __syncwarp();
        if (p.whole + p.block / SPLIT < p.tiles) cluster_barrier(), cluster_barrier();
#endif
    } else {
        registers_increase<PRODUCT_REGISTERS>();
        multiply_tiles(p, ring, x_map, shared, role, thread % GROUP, GROUPED ? 0 : (const u16*)last, y);
    }
}
