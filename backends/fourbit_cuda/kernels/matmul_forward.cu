// linear_4bit for many rows of x, and for experts: y [M, N] = x [M, K] times the transposed weight [N, K], plus bias [N].
// For sm_90a: wgmma with the weight in registers and x in shared memory.
//
// One warpgroup fills two rings, of x and of the weight: packed, with tables of what its codes stand for. Two others, each
// with half of a tile's 128 outputs, decode by those tables straight into the registers that products take the weight from.
// Products run while the next operand is decoded: of a step of 64 of the inner dimension there are four, which are started
// CHUNKS at a time, and operands for BUFFERS such groups.
//
// Defines: DTYPE, BLOCKSIZE, NESTED, GROUPED, COLUMNS (rows of x in a tile: 32, 64, 128 or 256), SPLIT (blocks of a cluster,
// which share the last tiles), STAGES (of x), WEIGHT_STAGES, CHUNKS (2 or 4), BUFFERS (2 to 8 / CHUNKS), RESULT_COLUMNS (of
// results on their way out at a time), SUPPLY_REGISTERS, PRODUCT_REGISTERS, and those of `Memory` in matmul.py: *_AT.
#define EVEN_STEPS 1
#include "matmul_supply.h"
#include "matmul_results.h"

// What a lane decodes of a pair of steps, for the rows g = lane / 4 and g + 8 of its warp's 16: in each word, which has
// eight elements, byte lane % 4. Two words are 16 elements of the inner dimension, those of a product.
struct Operand {
    u32 words_at, table_at, bytes;  // in a weight stage; the selector of the bytes of two words
    u32x4 words[2][CHUNKS / 2];     // of both rows
    Values values[2];

    __device__ __forceinline__ Operand(u32 group, u32 thread) {
        const u32 lane = thread % 32, row = group * 64 + thread / 32 * 16 + lane / 4;
        words_at = row * 64 + ((row >> 1 & 3) << 4), table_at = PACKED_BYTES + row * 16;
        bytes = lane % 4 * 0x11 + 0x40;
        settle(bytes);  // or the compiler computes it again and again
    }

    // What group `j` of the pair's products needs.
    __device__ __forceinline__ void load(u32 stage, int j) {
#pragma unroll
        for (int i = 0; i < CHUNKS / 2; ++i) {
            const u32 from = stage + (words_at ^ (j * (CHUNKS / 2) + i) << 4);
            words[0][i] = shared_load4(from), words[1][i] = shared_load4(from + 8 * 64);
        }
        if (j * TABLES % (8 / CHUNKS) == 0) load_tables(stage, j * TABLES / (8 / CHUNKS));
    }
    __device__ __forceinline__ void load_tables(u32 stage, int table) {
        const u32 from = stage + table_at + table * TABLE_BYTES;
        load_values(from, values[0]), load_values(from + 8 * 16, values[1]);
    }

    __device__ __forceinline__ void decode(u32 stage, int j, u32 (&a)[CHUNKS][4]) {
#pragma unroll
        for (int i = 0; i < CHUNKS / 2; ++i) {
            if (i > 0 && BLOCKSIZE == 32) load_tables(stage, j * TABLES / (8 / CHUNKS) + i);
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const u32x4& w = words[row][i];
                values[row].decode(permute(w.x, w.y, bytes), a[2 * i][row], a[2 * i][row + 2]);
                values[row].decode(permute(w.z, w.w, bytes), a[2 * i + 1][row], a[2 * i + 1][row + 2]);
            }
        }
    }
};

FB_DEVICE void multiply_tiles(const Problem& p, const Rings& r, u32 shared, u32 group, u32 thread, const u16* bias, u16* y) {
    constexpr int of_step = 4 / CHUNKS, of_pair = 2 * of_step;  // groups of products
    const bool first = thread % 32 == 0;
    const u32 buffer = shared + RESULTS_AT + group * RESULT_BYTES;
    Operand operand(group, thread);
    u32 a[BUFFERS][CHUNKS][4];  // what products read while the next is decoded
    Place<STAGES> x, done;  // the next step's, and that of the first whose products may still run
    Place<WEIGHT_STAGES> weight;
    auto give_back = [&] {
        barrier_arrive(r.x_empty + 8 * done.at, first);
        done.next();
    };
    Work work(p);
    Tile t;
    while (same_in_wave(work.next(p, t))) {
        float sums[NT][4] = {};  // NVRTC 12 lets products wait for one another where they begin with nothing
        auto load_first = [&] {
            barrier_wait(r.weight_full + 8 * weight.at, weight.parity);
            operand.load(r.weight + weight.at * WEIGHT_BYTES, 0);
        };
        load_first();
        const u32 pairs = same_in_wave(t.steps / 2);
#pragma unroll 1
        for (u32 pair = 0; pair < pairs; ++pair) {
            u64 x_at;
#pragma unroll
            for (int j = 0; j < of_pair; ++j) {
                u32(&mine)[CHUNKS][4] = a[j % BUFFERS];
                const u32 stage = r.weight + weight.at * WEIGHT_BYTES;
                operand.decode(stage, j, mine);
                if (j + 1 < of_pair) {
                    operand.load(stage, j + 1);
                } else {
                    __syncwarp();
                    barrier_arrive(r.weight_empty + 8 * weight.at, first);
                    weight.next();
                    if (pair + 1 < pairs) load_first();
                }
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
        finish_tile(sums, p, t, work.shared, shared, buffer, group, thread, bias, y);
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
        if (p.shares()) cluster_barrier(), cluster_barrier();
    } else {
        registers_increase<PRODUCT_REGISTERS>();
        multiply_tiles(p, rings, shared, role, thread % GROUP, GROUPED ? 0 : (const u16*)last, y);
#if GROUPED
        clear_rest(y, p, thread, 2 * GROUP);
#endif
    }
}
