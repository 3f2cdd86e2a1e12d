// linear_4bit for many rows of x, and for experts: y [M, N] = x [M, K] times the transposed weight [N, K], plus bias [N].
// For sm_90a: wgmma with the weight in registers and x in shared memory.
//
// One warpgroup fills two rings, of x and of the weight. Two others, each with half of a tile's 128 outputs, decode straight
// into the registers that products take the weight from, by one of two means: matmul_bytes.h for tiles of few rows of x,
// matmul_tables.h for many. Products run while the next operand is decoded: of a step of 64 of the inner dimension there are
// four, which are started CHUNKS at a time, and operands for BUFFERS such groups.
//
// Defines: DTYPE, BLOCKSIZE, NESTED, GROUPED, COLUMNS (rows of x in a tile: 32, 64, 128, 192 or 256), BYTEWISE (by bytes),
// SPLIT (1, or 2 blocks of a cluster, which share the last tiles), STAGES (of x), WEIGHT_STAGES, CHUNKS (2 or 4), BUFFERS (2
// to 8 / CHUNKS), RESULT_COLUMNS (of results on their way out at a time), SUPPLY_REGISTERS, PRODUCT_REGISTERS, and those of
// `Memory` in matmul.py: *_AT.
#define EVEN_STEPS 1
#include "matmul_supply.h"
#include "matmul_results.h"

FB_DEVICE void multiply_tiles(const Problem& p, const Rings& r, u32 shared, u32 group, u32 thread, const float* code,
                              const u16* bias, u16* y) {
    constexpr int of_step = 4 / CHUNKS, of_pair = 2 * of_step;  // groups of products
    constexpr int ahead = Operand::AHEAD_OF_PRODUCTS;
    const bool first = thread % 32 == 0;
    const u32 buffer = shared + RESULTS_AT + group * RESULT_BYTES;
    Operand operand(group, thread, shared, code);
    u32 a[BUFFERS][CHUNKS][4];  // what products read while the next is decoded
    Place<STAGES> x, done;  // the next step's, and that of the first whose products may still run
    Place<WEIGHT_STAGES> weight;
    auto stage = [&] { return r.weight + weight.at * WEIGHT_BYTES; };
    auto give_back = [&] {
        barrier_arrive(r.x_empty + 8 * done.at, first);
        done.next();
    };
    Work work(p);
    Tile t;
    while (same_in_wave(work.next(p, t))) {
        float sums[NT][4] = {};  // NVRTC 12 lets products wait for one another where they begin with nothing
        barrier_wait(r.weight_full + 8 * weight.at, weight.parity);
        operand.load(stage(), 0);
        if (ahead > 1) {
            operand.look_up(0);
            operand.load(stage(), 1);
        }
        const u32 pairs = same_in_wave(t.steps / 2);
#pragma unroll 1
        for (u32 pair = 0; pair < pairs; ++pair) {
            u64 x_at;
#pragma unroll
            for (int j = 0; j < of_pair; ++j) {
                u32(&mine)[CHUNKS][4] = a[j % BUFFERS];
                auto prepare_next = [&] {
                    operand.look_up(j + 1);
                    const bool more = j + ahead < of_pair || pair + 1 < pairs;
                    if (j + ahead == of_pair) {
                        __syncwarp();
                        barrier_arrive(r.weight_empty + 8 * weight.at, first);
                        weight.next();
                        if (more) barrier_wait(r.weight_full + 8 * weight.at, weight.parity);
                    }
                    if (more) operand.load(stage(), (j + ahead) % of_pair);
                };
                operand.decode(stage(), j, mine);
                if (!BYTEWISE) prepare_next();
                if (j % of_step == 0) {
                    barrier_wait(r.x_full + 8 * x.at, x.parity);
                    x_at = operand_rows(r.x + x.at * X_BYTES);
                    x.next();
                }
#pragma unroll
                for (int i = 0; i < 4 * CHUNKS; ++i) settle(mine[i / 4][i % 4]);
                products_fence();
#pragma unroll
                for (int i = 0; i < CHUNKS; ++i)
                    start_product(sums, mine[i], x_at + (j % of_step * CHUNKS + i) * 2, j + i > 0 ? 1 : pair);
                products_commit();
                if (BYTEWISE) prepare_next();
                products_wait<BUFFERS - 1>();  // what is decoded next takes the place of what these were started with
                const int ended = j + 1 - BUFFERS;
                if ((ended + of_pair) % of_step == of_step - 1 && (ended >= 0 || pair > 0)) give_back();
            }
        }
        products_wait<0>();
#pragma unroll
        for (int i = 0; i < (BUFFERS - 1 + of_step - 1) / of_step; ++i) give_back();
#pragma unroll
        for (int i = 0; i < NT; ++i)
#pragma unroll
            for (int c = 0; c < 4; ++c) settle(sums[i][c]);
        finish_tile(sums, p, t, work.shared, shared, shared, buffer, group, thread, bias, y);
    }
}

// x [rows, k] and y [rows, n] in DTYPE, of which x_map describes x in boxes of 64 x COLUMNS; w_map packed u8 [E * N, K / 2]
// in boxes of 64 bytes x 128 rows; `last`: bias [N] or null, with GROUPED offsets [E], int64 if `wide`, else int32, with
// `experts` E. K is a multiple of 64 and of BLOCKSIZE.
extern "C" __global__ void __launch_bounds__(THREADS, 1) CLUSTER
    matmul_forward(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const void* absmax,
                   const float* code, const float* nested_absmax, const float* nested_code, const float* nested_offset,
                   const void* last, u16* y, i64 rows, i64 n, i64 k, i64 experts, i64 wide) {
    extern __shared__ __align__(1024) u8 shared_[];
    const u32 shared = shared_address(shared_);
    const u32 thread = threadIdx.x, role = same_in_wave(thread / GROUP);
    const Rings rings(shared);
    begin(rings, x_map, w_map, shared, thread, nested_code, last, rows, experts, wide);

    const Problem p((u32)rows, (u32)n, (u32)k, (u32)n, (u32)experts, shared + EXPERTS_AT);
    if (role == 2) {
        registers_decrease<SUPPLY_REGISTERS>();
        const ScaleSource scales = {absmax, nested_absmax, shared + CODES_AT, NESTED ? *nested_offset : 0.0f};
        supply(p, rings, x_map, w_map, code, scales, thread % GROUP, (u32)k);
        if (p.shares()) cluster_meet();
    } else {
        registers_increase<PRODUCT_REGISTERS>();
        multiply_tiles(p, rings, shared, role, thread % GROUP, code, GROUPED ? 0 : (const u16*)last, y);
#if GROUPED
        clear_rest(y, p, thread, 2 * GROUP);
#endif
    }
}
