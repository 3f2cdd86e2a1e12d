// linear_4bit on the matrix units: y [M, N] = x [M, K] times the transposed 4-bit weight [N, K], plus bias [N].
//
// The weight is the m16 operand of the products, x the n8 operand. A block owns a range of rows of the weight; its
// WR x WK warps take 16 RT rows each and every WK-th slice of KW elements. Each warp streams its bytes through a ring
// of its own in shared memory. A byte becomes two 16-bit values by a table of 256 entries that has a copy for each
// bank. The scale multiplies the float32 sum of one quantization block, after the products. At the end the block (and
// with SPLIT > 1 the cluster of SPLIT blocks that share rows) adds up its warps' sums in a fixed order.
//
// Defines: DTYPE, BLOCKSIZE, NESTED, RT, NT (n8 tiles of x rows), WR, WK, KW (64, 128 or 256), STAGES, SPLIT,
// RESIDENT (1: all of x stays in shared memory; 0: it streams too), EVEN (K is a multiple of KW), GROUPED, WGMMA (1:
// groups of four warps multiply on sm_90a's asynchronous unit, which reads x from shared memory itself), WIDE
// (1: a layout of the table that saves instructions and takes twice the space; KW = 256).
#define SUM_STRIDE (BLOCK_ROWS + 4)
#if WGMMA
#include "slice_wgmma.h"
#else
#include "slice_mma.h"
#endif

// x [M, K] and y [M, N] in DTYPE; packed u8 [N, K / 2]; a block's range of rows of the weight is `range`, worked on
// in passes of `pass` <= BLOCK_ROWS rows. x and packed are 16-byte aligned, absmax too (4 where NESTED), K % 64 == 0.
// WGMMA: x comes as arrange_x.cu lays it out, padded to a multiple of KW.
// GROUPED: `bias` is int64 offsets [E], the block's expert is blockIdx.y, and M the expert's own.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
#if SPLIT > 1
    __cluster_dims__(SPLIT, 1, 1)
#endif
        linear_mma(const u16* x, const u8* packed, const void* absmax, const float* code, const float* nested_absmax,
                   const float* nested_code, const float* nested_offset, const void* bias, u16* y, i64 rows_of_x, i64 n_,
                   i64 k_, i64 range_, i64 pass_) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = shared_address(shared), window = base & 0xff000000u;
    if (base - window != SHARED_BASE) trap();  // matrix.h would be wrong about this device
    const u32 thread = threadIdx.x, lane = thread % 32, warp = same_in_wave(thread / 32);
    const u32 wr = warp % WR, wk = warp / WR;
    const u32 lane4 = window | 4 * lane, x_ring = window + X_AT;
#if WGMMA
    const u32 barriers = window + BARRIERS_AT;
#endif

    const u32 n = (u32)n_, k = (u32)k_, range = (u32)range_, pass = (u32)pass_;
    const u32 rank = SPLIT > 1 ? blockIdx.x % SPLIT : 0;
    const u32 steps_in_all = (k + SLICE - 1) / SLICE;
    const u32 first_step = steps_in_all * rank / SPLIT, steps = steps_in_all * (rank + 1) / SPLIT - first_step;
    const u32 k_first = first_step * SLICE;
    const u32 row_first = blockIdx.x / SPLIT * range;
    const u32 row_end = row_first + range < n ? row_first + range : n;

    i64 m_first = 0, m_end = rows_of_x;
    u32 expert_row = 0;
#if GROUPED
    after_previous();
    const i64* offsets = (const i64*)bias;
    const u32 expert = blockIdx.y;
    expert_row = expert * n;
    for (u32 e = 0; e < expert; ++e) m_first = offsets[e] > m_first ? offsets[e] : m_first;
    m_end = offsets[expert] < rows_of_x ? offsets[expert] : rows_of_x;
    if (m_end <= m_first) return;
    const Weight w = {packed, absmax, nested_absmax, k, k / BLOCKSIZE, gridDim.y * n * (k / BLOCKSIZE)};
#else
    m_first = (i64)blockIdx.y * COLUMNS;
    m_end = m_first + COLUMNS < rows_of_x ? m_first + COLUMNS : rows_of_x;
    const Weight w = {packed, absmax, nested_absmax, k, k / BLOCKSIZE, n * (k / BLOCKSIZE)};
    if (thread == 0) prefetch_line(code);
    for (u32 r = row_first + thread / 4; r < row_first + pass && r < row_end; r += THREADS / 4) {
#pragma unroll
        for (u32 i = 0; i < (WGMMA ? STAGES - 1 : 1); ++i) {  // what the first slots will hold
            u32 at = k_first + (4 * i + thread % 4) * (SLICE / 4);
            if (at + SLICE / 4 <= k) prefetch(packed + (u64)r * (k / 2) + at / 2, SLICE / 8);
        }
    }
#if WGMMA
    if (thread == 0) barriers_init(barriers);
#endif
    after_previous();
    let_next_start();
#endif

    // The slices of all passes form one sequence. `fetched` counts those asked for, pass and step say which is next.
    const u32 passes = (row_end - row_first + pass - 1) / pass;
    const u32 x_stride = RESIDENT ? 2 * steps * SLICE + 16 : X_STRIDE;
    // streaming, the sums take x's place when a pass is done
    const u32 sums_at = RESIDENT ? x_ring + x_stride * (rows_of_x < COLUMNS ? (u32)rows_of_x : COLUMNS) : x_ring;

    for (i64 m0 = m_first; m0 < m_end; m0 += COLUMNS) {
        const u32 columns = m_end - m0 < COLUMNS ? (u32)(m_end - m0) : COLUMNS;
        u32 fetch_pass = 0, fetch_step = 0, fetch_slot = 0;
#if WGMMA
        u32 fetcher = 0, used = 0, freed = 0;  // whose turn it is; bits of slots filled before; their parities
#endif
        auto fetch_next = [&](u32 last_pass) {
            if (fetch_pass <= last_pass) {
                const u32 top = row_first + fetch_pass * pass, bottom = top + pass < row_end ? top + pass : row_end;
                const u32 first = top + wr * ROWS, at = k_first + fetch_step * SLICE + wk * KW;
                if (first < bottom && at < k)
                    fetch(w, slot_of(window, fetch_slot, warp), expert_row + first, bottom - first, at, lane);
#if WGMMA
                const u32 x_at = k_first + fetch_step * SLICE;
                const bool again = used >> fetch_slot & 1;
                if (warp == fetcher && lane == 0) {
                    if (again) barrier_wait(barriers + 8 * (STAGES + fetch_slot), freed >> fetch_slot & 1);
                    const u32 end = (k + KW - 1) / KW * KW;  // padded with zeros
                    u32 bytes = (end - x_at < SLICE ? end - x_at : SLICE) * (2 * COLUMNS);
                    copy_bulk(x_ring + fetch_slot * X_BYTES, x + (m0 * end + (u64)x_at * COLUMNS), bytes,
                              barriers + 8 * fetch_slot);
                }
                freed ^= (u32)again << fetch_slot;
                used |= 1u << fetch_slot;
#elif !RESIDENT
                const u32 x_at = k_first + fetch_step * SLICE;
                const u32 to = x_ring + fetch_slot * X_BYTES;
                for (u32 i = thread; i < columns * (SLICE / 8); i += THREADS) {
                    u32 m = i / (SLICE / 8), piece = i % (SLICE / 8);
                    u32 at = x_at + piece * 8;
                    copy16(to + m * X_STRIDE + piece * 16, x + (m0 + m) * k + (at < k ? at : 0), at < k ? 16 : 0);
                }
#endif
                if (++fetch_step == steps) fetch_step = 0, ++fetch_pass;
            }
            copies_commit();
            fetch_slot = fetch_slot + 1 == STAGES ? 0 : fetch_slot + 1;
        };
        const u32 ahead = RESIDENT ? passes - 1 : 0;
#pragma unroll 1
        for (int i = 0; i < STAGES - 1; ++i) {
#if RESIDENT
            if (i == 0) {
                const u32 pieces = steps * (SLICE / 8);
                for (u32 m = 0; m < columns; ++m)
                    for (u32 piece = thread; piece < pieces; piece += THREADS) {
                        u32 at = k_first + piece * 8;
                        copy16(x_ring + m * x_stride + piece * 16, x + (m0 + m) * k + (at < k ? at : 0),
                               at < k ? 16 : 0);
                    }
            }
#endif
            fetch_next(ahead);
        }

        // the table, while the first copies fly
        if (m0 == m_first) {
            for (u32 entry = thread; entry < 256; entry += THREADS) {
                u32 pair = DTYPE == FB_BF16 ? floats_to_bf16x2(code[entry >> 4], code[entry & 15])
                                            : floats_to_f16x2(code[entry >> 4], code[entry & 15]);
#pragma unroll
                for (u32 i = 0; i < 8; ++i) shared_store4(window + TABLE_AT + entry * ENTRY_BYTES + (i + lane & 7) * 16, pair);
            }
#if NESTED
            for (u32 i = thread; i < 256; i += THREADS) shared_store(window + CODES_AT + 4 * i, bits_of(nested_code[i]));
#endif
        }
        const ScaleTable scale_table = {window + CODES_AT, NESTED ? *nested_offset : 0.0f};
        copies_wait<STAGES - 2>();
        block_barrier();

#if !WGMMA
        u32 x_of[NT];  // this lane's row of x in each n8 tile; those past the end repeat the last
#pragma unroll
        for (int i = 0; i < NT; ++i) {
            u32 m = 8 * i + lane / 4;
            x_of[i] = x_ring + (m < columns ? m : columns - 1) * x_stride + wk * (2 * KW);
        }
#endif
        u32 slot = 0;
#if WGMMA
        u32 parity = 0;
#endif
        for (u32 p = 0; p < passes; ++p) {
            const u32 top = row_first + p * pass, bottom = top + pass < row_end ? top + pass : row_end;
            const u32 first = top + wr * ROWS;
            const bool busy = (WGMMA ? top + wr / 4 * 4 * ROWS : first) < bottom;  // four warps multiply together
            float sums[RT][NT][4] = {};
#pragma unroll 1
            for (u32 step = 0; step < steps; ++step) {
                copies_wait<STAGES - 2>();
                if (RESIDENT || WGMMA) wave_barrier();
                else block_barrier();
                const u32 at = k_first + step * SLICE + wk * KW;
                const Slot from = slot_of(window, slot, warp);
#if WGMMA
                const u32 here = x_ring + slot * X_BYTES + wk * (KW * 2 * COLUMNS);
#else
                u32 here[NT];
#pragma unroll
                for (int i = 0; i < NT; ++i)
                    here[i] = x_of[i] + (RESIDENT ? step * (2 * SLICE) : slot * X_BYTES);
#endif
                fetch_next(RESIDENT ? ahead : p);
#if WGMMA
                fetcher = fetcher + 1 == WARPS ? 0 : fetcher + 1;  // it waits for the others: by turns
                barrier_wait(barriers + 8 * slot, parity >> slot & 1);
                parity ^= 1u << slot;
#endif
                if (busy && at < k) {
#if NESTED && !DIRECT
                    decode_scales(w, from, scale_table, expert_row + first, at, lane);
#endif
                    multiply_slice(sums, from, lane4, here, scale_table, lane);
                }
#if WGMMA
                wave_barrier();
                if (lane == 0) barrier_arrive(barriers + 8 * (STAGES + slot));
#endif
                slot = slot + 1 == STAGES ? 0 : slot + 1;
            }

            // sums of warps that share rows, and of the cluster's blocks, in a fixed order
            if (!RESIDENT || p > 0) block_barrier();  // the place is still read from, or a ring
            const u32 g = lane / 4, t = lane % 4;
            if (busy) {
#pragma unroll
                for (int r = 0; r < RT; ++r)
#pragma unroll
                    for (int i = 0; i < NT; ++i)
#pragma unroll
                        for (int c = 0; c < 4; ++c) {
                            u32 m = 8 * i + 2 * t + c % 2, row = wr * ROWS + 16 * r + 8 * (c / 2) + g;
                            if (m < columns)
                                shared_store(sums_at + 4 * ((wk * COLUMNS + m) * SUM_STRIDE + row),
                                             bits_of(sums[r][i][c]));
                        }
            }
            if (SPLIT > 1) cluster_barrier();
            else block_barrier();
            const u32 height = bottom - top, count = columns * BLOCK_ROWS;
            for (u32 i = thread + rank * THREADS; i < count; i += SPLIT * THREADS) {
                u32 m = i / BLOCK_ROWS, row = i % BLOCK_ROWS;
                if (row >= height) continue;
                float sum = 0.0f;
#pragma unroll
                for (int s = 0; s < SPLIT; ++s)
#pragma unroll
                    for (int j = 0; j < WK; ++j) {
                        u32 from = sums_at + 4 * ((j * COLUMNS + m) * SUM_STRIDE + row);
                        sum += SPLIT > 1 ? cluster_load(from, s) : float_of(shared_load(from));
                    }
                u32 column = top + row;
#if !GROUPED
                if (bias) {
                    u32 bits = ((const u16*)bias)[column];
                    sum += DTYPE == FB_BF16 ? bf16_to_float(bits) : f16_to_float(bits);
                }
#endif
                y[(m0 + m) * n + column] = (u16)(DTYPE == FB_BF16 ? float_to_bf16(sum) : float_to_f16(sum));
            }
            if (SPLIT > 1) cluster_barrier();  // a block's memory stays until the others have read it
            else if (!RESIDENT) block_barrier();
            if (!RESIDENT && p + 1 < passes) {
                fetch_slot = slot;
                copies_wait<0>();
#if WGMMA
                async_fence();  // the sums lay where x goes now
                block_barrier();
#endif
                for (int i = 0; i < STAGES - 1; ++i) fetch_next(p + 1);
            }
        }
        copies_wait<0>();
        block_barrier();
    }
}
