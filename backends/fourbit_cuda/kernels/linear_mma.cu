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
// (1: a layout of the table that saves instructions and takes twice the space; KW = 256); and those of `Layout` in
// tile.py.

// A struct X each, with the same functions: `init` for a block; then, for a part of x, `fetch_once` (with the first
// slice) and `fetch` (with each) start copies, `locate` follows when the first have been asked for; for a slice `meet`
// (all that it needs from other warps), `place` (its address), `wait` (its bytes are there; gives the bits of `parity`
// to turn) and `release` (this warp is done with it); `sums_read` before x takes the place of sums again.
#if WGMMA
#include "x_bulk.h"
#elif RESIDENT
#include "x_resident.h"
#else
#include "x_streamed.h"
#endif
#include "sums.h"

// x [M, K] and y [M, N] in DTYPE; packed u8 [N, K / 2]; a block's range of rows of the weight is `range`, worked on
// in passes of `pass` <= BLOCK_ROWS rows. x and packed are 16-byte aligned, absmax too (4 where NESTED), K % 64 == 0.
// WGMMA: x comes as arrange_x.cu lays it out, padded to a multiple of KW.
// GROUPED: `bias` is offsets [E], int64 if `wide`, else int32, with `experts` E; M is the expert's own: of those with
// rows the blockIdx.y-th.
extern "C" __global__ void __launch_bounds__(THREADS, 1) CLUSTER
    linear_mma(const u16* x, const u8* packed, const void* absmax, const float* code, const float* nested_absmax,
               const float* nested_code, const float* nested_offset, const void* bias, u16* y, i64 rows_of_x, i64 n,
               i64 k_, i64 range, i64 pass, i64 experts, i64 wide) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 window = window_of(shared);
    const Share share(window, threadIdx.x, blockIdx.x, n, k_, range, pass);
    const u32 k = share.k, lane = share.lane;

    if (GROUPED) after_previous();  // it writes the offsets
    const Offsets offsets = {bias, wide != 0};
    const Rows rows = GROUPED ? rows_of_expert(blockIdx.y, rows_of_x, offsets, (u32)experts, share.n, lane)
                              : rows_of_block(blockIdx.y, rows_of_x);
    if (GROUPED) {
        clear_rest(y, rows_of_x, offsets, (u32)experts, share.n, share.thread);
        if (rows.end <= rows.first) return;
    }
    const u32 row_scales = k / BLOCKSIZE;
    const Weight w = {packed, absmax, nested_absmax, k, row_scales, (GROUPED ? (u32)experts : 1) * share.n * row_scales};
    if (!GROUPED) {
        prefetch_first(share, packed, code);
        X::init(share);
        after_previous();
        let_next_start();
    }
    const u32 passes = share.passes();
    const u32 sums_at = X::sums_at(share, rows_of_x);

    for (i64 m0 = rows.first; m0 < rows.end; m0 += COLUMNS) {
        const u32 columns = rows.end - m0 < COLUMNS ? (u32)(rows.end - m0) : COLUMNS;
        // The slices of all passes form one sequence; this asks for the next of them, up to that of `last_pass`.
        u32 next_pass = 0, next_step = 0, next_slot = 0;
        X from_x(share, x, m0, columns);
        auto fetch_next = [&](u32 last_pass) {
            if (next_pass <= last_pass) {
                const u32 top = share.top(next_pass), bottom = share.bottom(top), first = top + share.wr * ROWS;
                const u32 at = share.k_first + next_step * SLICE + share.wk * KW;
                if (first < bottom && at < k)
                    fetch(w, slot_of(window, next_slot, share.warp), rows.weight + first, bottom - first, at, lane);
                from_x.fetch(share, share.k_first + next_step * SLICE, next_slot);
                if (++next_step == share.steps) next_step = 0, ++next_pass;
            }
            copies_commit();
            next_slot = next_slot + 1 == STAGES ? 0 : next_slot + 1;
        };
        const u32 ahead = RESIDENT ? passes - 1 : 0;
#pragma unroll 1
        for (int i = 0; i < STAGES - 1; ++i) {
            if (i == 0) from_x.fetch_once(share);
            fetch_next(ahead);
        }

        if (m0 == rows.first) fill_tables(window, code, nested_code, share.thread, lane);  // while the first copies fly
        const ScaleTable scale_table = {window + CODES_AT, NESTED ? *nested_offset : 0.0f};
        copies_wait<STAGES - 2>();
        block_barrier();

        from_x.locate(share);
        u32 slot = 0, parity = 0;
        for (u32 p = 0; p < passes; ++p) {
            const u32 top = share.top(p), bottom = share.bottom(top), first = top + share.wr * ROWS;
            // four warps of wgmma multiply together
            const bool busy = (WGMMA ? top + share.wr / 4 * 4 * ROWS : first) < bottom;
            float sums[RT][NT][4] = {};
#pragma unroll 1
            for (u32 step = 0; step < share.steps; ++step) {
                copies_wait<STAGES - 2>();
                from_x.meet();
                const u32 at = share.k_first + step * SLICE + share.wk * KW;
                const Slot from = slot_of(window, slot, share.warp);
                Place here;
                from_x.place(here, share, step, slot);
                fetch_next(RESIDENT ? ahead : p);
                parity ^= from_x.wait(slot, parity);
                if (busy && at < k) {
                    decode_scales(w, from, scale_table, rows.weight + first, at, lane);
                    multiply_slice(sums, from, share.lane4, here, scale_table, lane);
                }
                from_x.release(share, slot);
                slot = slot + 1 == STAGES ? 0 : slot + 1;
            }

            if (!RESIDENT || p > 0) block_barrier();  // the place is still read from, or a ring
            if (busy) store_sums(share, sums, sums_at, columns);
            sums_barrier();
            write_results(share, p, sums_at, columns, GROUPED ? 0 : (const u16*)bias, y, m0);
            if (SPLIT > 1) cluster_meet();  // a block's memory stays until the others have read it
            else if (!RESIDENT) block_barrier();
            if (!RESIDENT && p + 1 < passes) {
                next_slot = slot;
                copies_wait<0>();
                from_x.sums_read();  // they lay where x goes now
                for (int i = 0; i < STAGES - 1; ++i) fetch_next(p + 1);
            }
        }
        copies_wait<0>();
        block_barrier();
    }
}
