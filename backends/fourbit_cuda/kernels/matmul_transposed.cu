// The gradient for x of linear_4bit and of experts: y [M, K] = x [M, N] times the weight [N, K]. For sm_90a: wgmma with both
// operands in shared memory.
//
// One or two warpgroups (DECODERS; they take turns) decode the weight, step by step of 64 of the inner dimension, into
// tiles of 64 x 128 outputs of 16-bit values; two others multiply them by tiles of x. The copy engine brings tiles of x
// and, for a pair of steps at a time, of the packed weight. A ring of STAGES (x tile, decoded tile) lies between: "full"
// barriers count the copy and the decoding group's four warps, "empty" ones the eight warps that multiply. The packed
// weight has a ring and barriers of its own.
//
// Defines: DTYPE, BLOCKSIZE, NESTED, GROUPED, COLUMNS (rows of x in a tile: 32, 64, 128, 192 or 256), DECODERS, SPLIT (1, or
// 2 blocks of a cluster, which share the last tiles), STAGES, WEIGHT_STAGES, RESULT_COLUMNS (of results on their way out at a
// time), DECODER_REGISTERS, PRODUCT_REGISTERS, and those of `Memory` in matmul.py: *_AT.
#define EVEN_STEPS 0
#include "matmul_decode.h"
#include "matmul_results.h"

// What decoders do; `group`: which of the DECODERS warpgroups. Several take the steps in turn, one both of a pair.
FB_DEVICE void decode_tiles(const Problem& p, const Ring& r, const TensorMap& map, const float* code_,
                            const ScaleSource& scales, u32 group, u32 thread, u32 k) {
    constexpr u32 mine = DECODERS == 1 ? 2 : 1;  // steps of a pair
    const bool first = thread % 32 == 0, fetches = group == 0 && thread == 32;
    float code[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) code[i] = code_[i];
    Fetcher fetcher(p);
    if (fetches)
        for (int i = 0; i < WEIGHT_STAGES - 1; ++i) fetcher.fetch_weight(p, r, map);
    __syncwarp();
    u32 base = 0, pair_base = 0;  // steps and pairs of the tiles before
    u32 passed = 0;               // pairs that the group is done with
    auto pass = [&] {
        __syncwarp();
        if (first) barrier_arrive(r.weight_empty + 8 * (passed % WEIGHT_STAGES));
        if (fetches) fetcher.fetch_weight(p, r, map);  // to where the pair before was, which all are done with soon
        __syncwarp();
        ++passed;
    };
    // Every group takes part in every pair, and its turn comes at equal distances of less than STAGES steps, from tile to
    // tile too: or a barrier's phases could pass it by unseen.
    auto wait_for = [&](u32 pair) {
        while (true) {
            barrier_wait(r.weight_full + 8 * (passed % WEIGHT_STAGES), passed / WEIGHT_STAGES & 1);
            if (DECODERS == 1 || passed == pair) return;
            pass();
        }
    };
    Work work(p);
    Tile t;
    while (work.next(p, t)) {
        const Place64 place(t, thread, k);
        Scale next[mine][BLOCKS];
        auto ask = [&](u32 step) {
#pragma unroll
            for (u32 h = 0; h < mine; ++h)
#pragma unroll
                for (u32 b = 0; b < BLOCKS; ++b)
                    next[h][b] = ask_scale(scales, place.block(step + h, k) + b, place.there(t, step + h, p.n));
        };
        const u32 start = (group + DECODERS - base % DECODERS) % DECODERS;
        ask(start);
#pragma unroll 1
        for (u32 step = start; step < t.steps; step += mine * DECODERS) {
            float scale[mine][BLOCKS];
#pragma unroll
            for (u32 h = 0; h < mine; ++h)
#pragma unroll
                for (u32 b = 0; b < BLOCKS; ++b)
                    scale[h][b] = get_scale(scales, next[h][b], place.there(t, step + h, p.n));
            ask(step + mine * DECODERS);
            const u32 pair = pair_base + step / 2;
            wait_for(pair);
            const u32 from = r.weight + pair % WEIGHT_STAGES * WEIGHT_BYTES;
            u32x4 words[mine][2];
#pragma unroll
            for (u32 h = 0; h < mine; ++h)
#pragma unroll
                for (u32 i = 0; i < 2; ++i)
                    words[h][i] = shared_load4(from + place.piece(DECODERS == 1 ? h : step % 2, i));
            pass();
#pragma unroll
            for (u32 h = 0; h < mine; ++h) {
                if (step + h >= t.steps) break;
                const u32 it = base + step + h, stage = it % STAGES;
                Values values;
                values.build(code, scale[h][0]);
                barrier_wait(r.empty + 8 * stage, it / STAGES & 1 ^ 1);
                const u32 to = r.ring + stage * STAGE_BYTES + X_BYTES + thread * 128;
#pragma unroll
                for (u32 i = 0; i < 2; ++i) {
                    if (i == 1 && BLOCKS == 2) values.build(code, scale[h][BLOCKS - 1]);
                    const u32 w[4] = {words[h][i].x, words[h][i].y, words[h][i].z, words[h][i].w};
#pragma unroll
                    for (u32 c = 0; c < 4; ++c)
                        shared_store4(to + ((4 * i + c ^ thread & 7) << 4), values.decode(w[c]));
                }
                async_fence();  // the tensor cores read it
                __syncwarp();
                if (first) barrier_arrive(r.full + 8 * stage);
            }
        }
        base += t.steps, pair_base += (t.steps + 1) / 2;
        if (DECODERS > 1 && passed < pair_base) wait_for(pair_base - 1), pass();
    }
}

// What the other two warpgroups do.
FB_DEVICE void multiply_tiles(const Problem& p, const Ring& r, const TensorMap& map, u32 shared, u32 group, u32 thread,
                              u16* y) {
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
        float sums[NT][4] = {};  // NVRTC 12 lets products wait for one another where they begin with nothing
#pragma unroll 1
        for (u32 step = 0; step < t.steps; ++step) {
            const u32 it = base + step, stage = it % STAGES;
            barrier_wait(r.full + 8 * stage, it / STAGES & 1);
            const u32 x = r.ring + stage * STAGE_BYTES;
            const u64 x_at = operand_rows(x), a_at = operand_rows(x + X_BYTES + group * 8192);
            products_fence();
#pragma unroll
            for (int i = 0; i < 4; ++i)
                start_product(sums, a_at + i * 128, x_at + i * 2, step + i);
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
            for (int c = 0; c < 4; ++c) settle(sums[i][c]);
        finish_tile(sums, p, t, work.shared, shared, r.ring, buffer, group, thread, nullptr, y);
    }
}

// x [rows, n] and y [rows, k] in DTYPE, of which x_map describes x in boxes of 64 x COLUMNS; w_map packed u8 [E * N, K / 2]
// in boxes of 64 bytes x 128 rows; `last`: with GROUPED offsets [E], int64 if `wide`, else int32,
// with `experts` E. K is a multiple of 64 and of BLOCKSIZE.
extern "C" __global__ void __launch_bounds__(THREADS, 1) CLUSTER
    matmul_transposed(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const void* absmax,
                      const float* code, const float* nested_absmax, const float* nested_code, const float* nested_offset,
                      const void* last, u16* y, i64 rows, i64 n, i64 k, i64 experts, i64 wide) {
    extern __shared__ __align__(1024) u8 shared_[];
    const u32 shared = shared_address(shared_);
    const u32 thread = threadIdx.x, role = same_in_wave(thread / GROUP);
    const Ring ring(shared);
    begin(ring, x_map, w_map, shared, thread, nested_code, last, rows, experts, wide);

    const Problem p((u32)rows, (u32)k, (u32)n, (u32)n, (u32)experts, shared + EXPERTS_AT);
    if (role >= 2) {
        registers_decrease<DECODER_REGISTERS>();
        const ScaleSource scales = {absmax, nested_absmax, shared + CODES_AT, NESTED ? *nested_offset : 0.0f};
        decode_tiles(p, ring, w_map, code, scales, role - 2, thread % GROUP, (u32)k);
        if (p.shares()) {
            __syncwarp();
            cluster_meet();
        }
    } else {
        registers_increase<PRODUCT_REGISTERS>();
        multiply_tiles(p, ring, x_map, shared, role, thread % GROUP, y);
#if GROUPED
        clear_rest(y, p, thread, 2 * GROUP);
#endif
    }
}
