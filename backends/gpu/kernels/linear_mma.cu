// linear_4bit on the matrix units: y [M, N] = x [M, K] times the transposed 4-bit weight [N, K], plus bias [N].
//
// The weight is the m16 operand of the products, x the n8 operand. A block owns a range of rows of the weight; its
// WR x WK warps take 16 RT rows each and every WK-th slice of KW elements. Each warp streams its bytes through a ring
// of its own in shared memory. A byte becomes two 16-bit values by a table of 256 entries that has a copy for each
// bank. The scale multiplies the float32 sum of one quantization block, after the products. At the end the block (and
// with SPLIT > 1 the cluster of SPLIT blocks that share rows) adds up its warps' sums in a fixed order.
//
// Defines: DTYPE, BLOCKSIZE, NESTED, RT, NT (n8 tiles of x rows), WR, WK, KW (64, 128 or 256), STAGES, SPLIT,
// RESIDENT (1: all of x stays in shared memory; 0: it streams too), EVEN (K is a multiple of KW), GROUPED.
#include "matrix.h"

#define WARPS (WR * WK)
#define THREADS (32 * WARPS)
#define ROWS (16 * RT)                                    // of a warp
#define BLOCK_ROWS (ROWS * WR)
#define COLUMNS (8 * NT)                                  // rows of x at a time
#define ROW_BYTES (KW / 2)                                // of a slice
#define PIECES (KW / 32)                                  // of 16 bytes in it
#define SCALES (KW > BLOCKSIZE ? KW / BLOCKSIZE : 1)      // of a row's slice
#define PARTS (BLOCKSIZE == 32 ? 2 : 1)                   // scales in 64 elements
#define WORDS (EVEN ? 1 : 2)                              // that hold a row's scale codes

#ifndef UNROLL
#define UNROLL (RT * NT >= 8 ? 1 : KW / 64)               // how much the compiler may overlap, as registers allow
#endif

#define TABLE_BYTES 32768
#define CODE_BYTES (NESTED ? 1024 : 0)
#define WEIGHT_BYTES (ROWS * ROW_BYTES)
#define SCALE_BYTES (ROWS * SCALES * 4)
#define SLOT_BYTES (WEIGHT_BYTES + SCALE_BYTES + (NESTED ? 2 * 4 * WORDS * ROWS : 0))
#define RING_BYTES (WARPS * STAGES * SLOT_BYTES)
#define SLICE (WK * KW)                                   // elements that the block's warps take side by side
#define X_STRIDE (2 * SLICE + 16)                         // bytes; 16 past a multiple of 32: no bank conflicts
#define X_BYTES (COLUMNS * X_STRIDE)                      // of one stage, where x streams
#define SUM_STRIDE (BLOCK_ROWS + 4)

struct Weight {
    const u8* packed;
    const void* absmax;
    const float* nested_absmax;
    i64 rows, k, blocks;  // blocks: scales in all
};

// Byte offset of the 16-byte piece `piece` of a row of a slice: pieces are permuted so that reads hit all banks.
FB_DEVICE u32 piece_offset(u32 row, u32 piece) {
    u32 swap = KW == 256 ? (row & 3) << 1 | (row >> 2 & 1)
             : KW == 128 ? (row >> 1 & 1) << 1 | (row >> 2 & 1)
                         : row >> 2 & 1;
    return row * ROW_BYTES + ((piece ^ swap) << 4);
}

// Starts the copies of one slice of a warp's rows: [first, first + ROWS), those from `end` on left out.
FB_DEVICE void fetch(const Weight& w, u32 slot, i64 first, i64 end, i64 k, u32 lane) {
#pragma unroll
    for (int i = 0; i < ROWS * PIECES / 32; ++i) {
        u32 row = (i * 32 + lane) / PIECES, piece = lane % PIECES;
        i64 from = (first + row) * (w.k >> 1) + (k >> 1) + piece * 16;
        u32 to = slot + piece_offset(row, piece);
#if EVEN
        if (first + row < end) copy16(to, w.packed + from);
#else
        if (first + row < end) copy16(to, w.packed + from, k + piece * 32 < w.k ? 16 : 0);
#endif
    }
    u32 scales = slot + WEIGHT_BYTES;
#if NESTED
    u32 codes = scales + SCALE_BYTES, nested = codes + 4 * WORDS * ROWS;
#pragma unroll
    for (int i = 0; i < (ROWS * WORDS + 31) / 32; ++i) {
        u32 at = i * 32 + lane, row = at / WORDS, word = at % WORDS;
        if (at < ROWS * WORDS && first + row < end) {
            i64 index = ((first + row) * w.k + k) / BLOCKSIZE, byte = (index & ~3ll) + 4 * word;
            i64 left = w.blocks - byte;
            // what lies past the end is never asked for, but an address must be valid
            copy4(codes + 4 * at, (const u8*)w.absmax + (left > 0 ? byte : 0), left >= 4 ? 4 : left > 0 ? left : 0);
            i64 entry = (index >> 8) + word, last = (w.blocks - 1) >> 8;
            copy4(nested + 4 * at, w.nested_absmax + (entry < last ? entry : last), 4);
        }
    }
#elif EVEN && SCALES >= 2
    const int width = SCALES * 4 >= 16 ? 16 : 8, copies = SCALES * 4 / width;
#pragma unroll
    for (int i = 0; i < (ROWS * copies + 31) / 32; ++i) {
        u32 at = i * 32 + lane, row = at / copies, part = at % copies;
        if (at < ROWS * copies && first + row < end) {
            const float* from = (const float*)w.absmax + ((first + row) * w.k + k) / BLOCKSIZE + part * (width / 4);
            if (width == 16) copy16(scales + at * width, from);
            else copy8(scales + at * width, from);
        }
    }
#else
#pragma unroll
    for (int i = 0; i < (ROWS * SCALES + 31) / 32; ++i) {
        u32 at = i * 32 + lane, row = at / SCALES, part = at % SCALES;
        if (at < ROWS * SCALES && first + row < end) {
            i64 index = ((first + row) * w.k + k) / BLOCKSIZE + part;
            bool inside = k + part * BLOCKSIZE < w.k;
            copy4(scales + 4 * at, (const float*)w.absmax + (inside ? index : 0), inside ? 4 : 0);
        }
    }
#endif
}

#if NESTED
// Turns the codes of a slice's scales into scales; the product is rounded before the sum, as the format says.
FB_DEVICE void decode_scales(const Weight& w, u32 slot, u32 table, float offset, i64 first, i64 k, u32 lane) {
    u32 scales = slot + WEIGHT_BYTES, codes = scales + SCALE_BYTES, nested = codes + 4 * WORDS * ROWS;
#pragma unroll
    for (int i = 0; i < (ROWS * SCALES + 31) / 32; ++i) {
        u32 at = i * 32 + lane, row = at / SCALES, part = at % SCALES;
        if (at < ROWS * SCALES) {
            i64 index = ((first + row) * w.k + k) / BLOCKSIZE;
            u32 code = shared_load8(codes + 4 * WORDS * row + ((u32)index & 3) + part);
            u32 entry = WORDS == 1 ? 0 : (u32)((index + part >> 8) - (index >> 8));
            float unit = float_of(shared_load(nested + 4 * (WORDS * row + entry)));
            float scale = add_rn(mul_rn(float_of(shared_load(table + 4 * code)), unit), offset);
            bool inside = EVEN || k + part * BLOCKSIZE < w.k;
            shared_store(scales + 4 * at, inside ? bits_of(scale) : 0);
        }
    }
    wave_barrier();
}
#endif

// The table's entry of the byte at bits 8 i of `word`; `table` holds the lane's bank.
FB_DEVICE u32 decode(u32 table, u32 word, int i) {
    u32 offset = i == 0 ? word << 7 : word >> (8 * i - 7 & 31);
    return shared_constant((offset & 0x7f80u) + table);
}

// One slice of a warp: sums += weight slice times x slice. `x`: address of its first element, for column 0.
FB_DEVICE void multiply_slice(float (&sums)[RT][NT][4], u32 slot, u32 table, const u32 (&x)[NT], u32 lane) {
    u32 g = lane / 4, t = lane % 4;
#pragma unroll UNROLL
    for (int part = 0; part < KW / 64; ++part) {
        u32 a[RT][4][4];
#pragma unroll
        for (int r = 0; r < RT; ++r) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                u32 row = 16 * r + 8 * half + g;
#if PARTS == 1
                u32x2 bytes = shared_load2(slot + piece_offset(row, 2 * part + t / 2) + t % 2 * 8);
#else
                u32x2 bytes = {shared_load(slot + piece_offset(row, 2 * part) + 4 * t),
                               shared_load(slot + piece_offset(row, 2 * part + 1) + 4 * t)};
#endif
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    u32 word = j < 2 ? bytes.x : bytes.y;
                    a[r][j][half] = decode(table, word, j % 2 * 2);
                    a[r][j][half + 2] = decode(table, word, j % 2 * 2 + 1);
                }
            }
        }
        float scale[RT][2][PARTS];
#pragma unroll
        for (int r = 0; r < RT; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int p = 0; p < PARTS; ++p) {
                    u32 index = (64 * part + 32 * p) / BLOCKSIZE;
                    u32 at = (16 * r + 8 * half + g) * SCALES + index;
                    scale[r][half][p] = float_of(shared_load(slot + WEIGHT_BYTES + 4 * at));
                }
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            // lane t's elements: 16 in a row from 16 t, or 8 from 8 t of each half where blocks have 32
            u32 at = x[n] + 128 * part + (PARTS == 1 ? 32 : 16) * t;
            u32x4 b[2] = {shared_load4(at), shared_load4(at + (PARTS == 1 ? 16 : 64))};
#pragma unroll
            for (int r = 0; r < RT; ++r)
#pragma unroll
                for (int p = 0; p < PARTS; ++p) {
                    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
                    for (int j = 4 / PARTS * p; j < 4 / PARTS * (p + 1); ++j) {
                        const u32x4& v = b[j / 2];
                        multiply(d, a[r][j][0], a[r][j][1], a[r][j][2], a[r][j][3], j % 2 ? v.z : v.x,
                                 j % 2 ? v.w : v.y);
                    }
                    sums[r][n][0] += scale[r][0][p] * d[0];
                    sums[r][n][1] += scale[r][0][p] * d[1];
                    sums[r][n][2] += scale[r][1][p] * d[2];
                    sums[r][n][3] += scale[r][1][p] * d[3];
                }
        }
    }
}

// x [M, K] and y [M, N] in DTYPE; packed u8 [N, K / 2]; a block's range of rows of the weight is `range`, worked on
// in passes of `pass` <= BLOCK_ROWS rows. x and packed are 16-byte aligned, absmax too (4 where NESTED), K % 64 == 0.
// GROUPED: `bias` is int64 offsets [E], the block's expert is blockIdx.y, and M the expert's own.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
#if SPLIT > 1
    __cluster_dims__(SPLIT, 1, 1)
#endif
        linear_mma(const u16* x, const u8* packed, const void* absmax, const float* code, const float* nested_absmax,
                   const float* nested_code, const float* nested_offset, const void* bias, u16* y, i64 rows_of_x, i64 n,
                   i64 k, i64 range, i64 pass) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = shared_address(shared), thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const u32 wr = warp / WK, wk = warp % WK;
    const u32 table = base, nested_table = table + TABLE_BYTES, ring = nested_table + CODE_BYTES;
    const u32 my_ring = ring + warp * (STAGES * SLOT_BYTES), x_ring = ring + RING_BYTES;

    const u32 rank = SPLIT > 1 ? blockIdx.x % SPLIT : 0;
    const i64 steps_in_all = (k + SLICE - 1) / SLICE;
    const i64 first_step = steps_in_all * rank / SPLIT, steps = steps_in_all * (rank + 1) / SPLIT - first_step;
    const i64 k_first = first_step * SLICE;
    i64 row_first = blockIdx.x / SPLIT * range;
    i64 row_end = row_first + range < n ? row_first + range : n;

    i64 m_first = 0, m_end = rows_of_x, expert_row = 0;
#if GROUPED
    after_previous();
    const i64* offsets = (const i64*)bias;
    const i64 expert = blockIdx.y;
    expert_row = expert * n;
    for (i64 e = 0; e < expert; ++e) m_first = offsets[e] > m_first ? offsets[e] : m_first;
    m_end = offsets[expert] < rows_of_x ? offsets[expert] : rows_of_x;
    if (m_end <= m_first) return;
    const Weight w = {packed, absmax, nested_absmax, (i64)gridDim.y * n, k, (i64)gridDim.y * n * k / BLOCKSIZE};
#else
    m_first = (i64)blockIdx.y * COLUMNS;
    m_end = m_first + COLUMNS < rows_of_x ? m_first + COLUMNS : rows_of_x;
    const Weight w = {packed, absmax, nested_absmax, n, k, n * k / BLOCKSIZE};
    for (i64 r = row_first + thread / 4; r < row_first + pass && r < row_end; r += THREADS / 4) {
        i64 at = k_first + thread % 4 * (SLICE / 4);  // what the first slots will hold
        if (at + SLICE / 4 <= k) prefetch(packed + r * (k >> 1) + (at >> 1), SLICE / 8);
    }
    after_previous();
#endif

    // The slices of all passes form one sequence. `fetched` counts those asked for, pass and step say which is next.
    const i64 passes = (row_end - row_first + pass - 1) / pass;
    const i64 x_stride = RESIDENT ? 2 * steps * SLICE + 16 : X_STRIDE;
    const u32 sums_at = RESIDENT ? x_ring + (u32)x_stride * (rows_of_x < COLUMNS ? (u32)rows_of_x : COLUMNS) : ring;

    for (i64 m0 = m_first; m0 < m_end; m0 += COLUMNS) {
        const u32 columns = m_end - m0 < COLUMNS ? (u32)(m_end - m0) : COLUMNS;
        i64 fetch_pass = 0, fetch_step = 0;
        u32 fetch_slot = 0;
        auto fetch_next = [&](i64 last_pass) {
            if (fetch_pass <= last_pass) {
                i64 top = row_first + fetch_pass * pass, bottom = top + pass < row_end ? top + pass : row_end;
                i64 first = top + wr * ROWS, at = k_first + fetch_step * SLICE + wk * KW;
                if (first < bottom && at < k)
                    fetch(w, my_ring + fetch_slot * SLOT_BYTES, expert_row + first, expert_row + bottom, at, lane);
#if !RESIDENT
                const i64 x_at = k_first + fetch_step * SLICE;
                const u32 to = x_ring + fetch_slot * X_BYTES;
                for (u32 i = thread; i < columns * (SLICE / 8); i += THREADS) {
                    u32 m = i / (SLICE / 8), piece = i % (SLICE / 8);
                    i64 at = x_at + piece * 8;
                    copy16(to + m * X_STRIDE + piece * 16, x + (m0 + m) * k + (at < k ? at : 0), at < k ? 16 : 0);
                }
#endif
                if (++fetch_step == steps) fetch_step = 0, ++fetch_pass;
            }
            copies_commit();
            fetch_slot = fetch_slot + 1 == STAGES ? 0 : fetch_slot + 1;
        };
        const i64 ahead = RESIDENT ? passes - 1 : 0;  // streaming, the sums take the ring's place between passes
#pragma unroll 1
        for (int i = 0; i < STAGES - 1; ++i) {
#if RESIDENT
            if (i == 0) {
                const u32 pieces = (u32)steps * (SLICE / 8);
                for (u32 m = 0; m < columns; ++m)
                    for (u32 piece = thread; piece < pieces; piece += THREADS) {
                        i64 at = k_first + piece * 8;
                        copy16(x_ring + m * (u32)x_stride + piece * 16, x + (m0 + m) * k + (at < k ? at : 0),
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
                for (u32 i = 0; i < 8; ++i) shared_store4(table + entry * 128 + (i + lane & 7) * 16, pair);
            }
#if NESTED
            for (u32 i = thread; i < 256; i += THREADS) shared_store(nested_table + 4 * i, bits_of(nested_code[i]));
#endif
        }
#if NESTED
        const float offset = *nested_offset;
#endif
        copies_wait<STAGES - 2>();
        block_barrier();

        u32 x_of[NT];  // this lane's row of x in each n8 tile; those past the end repeat the last
#pragma unroll
        for (int i = 0; i < NT; ++i) {
            u32 m = 8 * i + lane / 4;
            x_of[i] = x_ring + (m < columns ? m : columns - 1) * (u32)x_stride + wk * (2 * KW);
        }
        u32 slot = 0;
        for (i64 p = 0; p < passes; ++p) {
            const i64 top = row_first + p * pass, bottom = top + pass < row_end ? top + pass : row_end;
            const i64 first = top + wr * ROWS;
            const bool busy = first < bottom;
            float sums[RT][NT][4] = {};
#pragma unroll 1
            for (i64 step = 0; step < steps; ++step) {
                copies_wait<STAGES - 2>();
                if (RESIDENT) wave_barrier();
                else block_barrier();
                const i64 at = k_first + step * SLICE + wk * KW;
                u32 from = my_ring + slot * SLOT_BYTES, here[NT];
#pragma unroll
                for (int i = 0; i < NT; ++i)
                    here[i] = x_of[i] + (RESIDENT ? (u32)step * (2 * SLICE) : slot * X_BYTES);
                fetch_next(RESIDENT ? ahead : p);
                if (busy && at < k) {
#if NESTED
                    decode_scales(w, from, nested_table, offset, expert_row + first, at, lane);
#endif
                    multiply_slice(sums, from, table + 4 * lane, here, lane);
                }
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
            const u32 height = (u32)(bottom - top), count = columns * BLOCK_ROWS;
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
                i64 column = top + row;
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
                slot = 0, fetch_slot = 0;
                copies_wait<0>();
                for (int i = 0; i < STAGES - 1; ++i) fetch_next(p + 1);
            }
        }
        copies_wait<0>();
        block_barrier();
    }
}
