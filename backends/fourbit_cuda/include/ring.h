// A block's shared memory: the table that decodes bytes, and each warp's ring of slices of the 4-bit weight.
//
// Defines: see linear_mma.cu, and `Layout` in tile.py, which says what lies where.
#pragma once
#include "matrix.h"

#define WARPS (WR * WK)
#define THREADS (32 * WARPS)
#define ROWS (16 * RT)                   // of a warp
#define BLOCK_ROWS (ROWS * WR)
#define COLUMNS (8 * NT)                 // rows of x at a time
#define PIECES (KW / 32)                 // of 16 bytes in a row of a slice
#define PARTS (BLOCKSIZE == 32 ? 2 : 1)  // scales in 64 elements
#define SLICE (WK * KW)                  // elements that the block's warps take side by side
#define STAGE_BYTES (WARPS * ROWS * ROW_STRIDE)
#define X_STRIDE (2 * SLICE + X_PAD)     // of a row of x's slice
#define X_BYTES (COLUMNS * X_STRIDE)     // of x's slice

// Whether lanes decode the scales they need when they need them; otherwise a warp decodes its slice's together, first.
#define DIRECT (NESTED && EVEN && SCALES == 4 && PARTS == 1 && !(WARPS > 8 && NT >= 8))  // registers

// In the block's window, of which dynamic shared memory starts at SHARED_BASE.
#define TABLE_AT SHARED_BASE
#define RING_AT (SHARED_BASE + RING_OFFSET)
#define SIDES_AT (SHARED_BASE + SIDES_OFFSET)
#define CODES_AT (SHARED_BASE + CODES_OFFSET)
#define BARRIERS_AT (SHARED_BASE + BARRIERS_OFFSET)
#define X_AT (SHARED_BASE + X_OFFSET)

struct Weight {
    const u8* packed;
    const void* absmax;
    const float* nested_absmax;
    u32 k, row_scales, blocks;  // row_scales: of a row; blocks: scales in all
};

// A warp's place for one slice.
struct Slot {
    u32 rows, scales;
};
FB_DEVICE Slot slot_of(u32 window, u32 stage, u32 warp) {
    u32 at;
#if WIDE
    if (stage < INSIDE) at = TABLE_AT + 128 + stage * STAGE_BYTES;
    else at = RING_AT + (stage - INSIDE) / 2 * STAGE_BYTES + (stage - INSIDE) % 2 * 128;
#else
    at = RING_AT + stage * STAGE_BYTES;
#endif
    return Slot{window + at + warp * (ROWS * ROW_STRIDE), window + SIDES_AT + (stage * WARPS + warp) * SIDE_BYTES};
}

// Byte offset of the 16-byte piece `piece` of a row of a slice: pieces are permuted so that reads hit all banks.
FB_DEVICE u32 piece_offset(u32 row, u32 piece) {
    u32 swap = KW == 256 ? (row & 3) << 1 | (row >> 2 & 1)
             : KW == 128 ? (row >> 1 & 1) << 1 | (row >> 2 & 1)
                         : row >> 2 & 1;
    return row * ROW_STRIDE + ((piece ^ swap) << 4);
}

// Starts the copies of one slice of a warp's rows: first … first + count - 1, at most ROWS.
FB_DEVICE void fetch(const Weight& w, Slot slot, u32 first, u32 count, u32 k, u32 lane) {
    const u32 lane_row = lane / PIECES, piece = lane % PIECES, half = w.k / 2;
    const u8* from = w.packed + (u64)(first + lane_row) * half + (k / 2 + piece * 16);
#pragma unroll
    for (u32 i = 0; i < ROWS * PIECES / 32; ++i) {
        const u32 row = i * (32 / PIECES);
        // what a whole group of rows adds to the place does not depend on the lane
        u32 to = slot.rows + (PIECES == 8 ? (piece_offset(lane_row, piece) ^ (i % 2 << 4)) + row * ROW_STRIDE
                                          : piece_offset(row + lane_row, piece));
#if EVEN
        if (row + lane_row < count) copy16(to, from);
#else
        if (row + lane_row < count) copy16(to, from, k + piece * 32 < w.k ? 16 : 0);
#endif
        from += (u64)(32 / PIECES) * half;
    }
#if NESTED
    const u32 codes = slot.scales + SIDE_CODES, nested = slot.scales + SIDE_NESTED;
#pragma unroll
    for (u32 i = 0; i < (ROWS * WORDS + 31) / 32; ++i) {
        u32 at = i * 32 + lane, row = at / WORDS;
        if (at < ROWS * WORDS && row < count) {
            u32 byte = (((first + row) * w.row_scales + k / BLOCKSIZE) & ~3u) + 4 * (at % WORDS);
            // what lies past the end is never asked for, but an address must be valid
            bool inside = byte < w.blocks;
            u32 left = inside ? w.blocks - byte : 0;
            copy4(codes + 4 * at, (const u8*)w.absmax + (inside ? byte : 0), left < 4 ? left : 4);
        }
    }
#pragma unroll
    for (u32 i = 0; i < (ROWS * NESTED_WORDS + 31) / 32; ++i) {
        // the upper half of the warp, where one half is enough for this and for the codes
        u32 at = i * 32 + (ROWS * NESTED_WORDS == 16 ? lane ^ 16 : lane), row = at / NESTED_WORDS;
        if (at < ROWS * NESTED_WORDS && row < count) {
            u32 entry = (((first + row) * w.row_scales + k / BLOCKSIZE) >> 8) + at % NESTED_WORDS;
            u32 last = (w.blocks - 1) >> 8;
            copy4(nested + 4 * at, w.nested_absmax + (entry < last ? entry : last), 4);
        }
    }
#elif EVEN && SCALES >= 2
    const u32 width = SCALES * 4 >= 16 ? 16 : 8, copies = SCALES * 4 / width;
#pragma unroll
    for (u32 i = 0; i < (ROWS * copies + 31) / 32; ++i) {
        u32 at = i * 32 + lane, row = at / copies;
        if (at < ROWS * copies && row < count) {
            u32 index = (first + row) * w.row_scales + k / BLOCKSIZE + at % copies * (width / 4);
            if (width == 16) copy16(slot.scales + at * width, (const float*)w.absmax + index);
            else copy8(slot.scales + at * width, (const float*)w.absmax + index);
        }
    }
#else
#pragma unroll
    for (u32 i = 0; i < (ROWS * SCALES + 31) / 32; ++i) {
        u32 at = i * 32 + lane, row = at / SCALES, part = at % SCALES;
        if (at < ROWS * SCALES && row < count) {
            u32 index = (first + row) * w.row_scales + k / BLOCKSIZE + part;
            bool inside = k + part * BLOCKSIZE < w.k;
            copy4(slot.scales + 4 * at, (const float*)w.absmax + (inside ? index : 0), inside ? 4 : 0);
        }
    }
#endif
}

// What a lane has to know to read scales.
struct ScaleTable {
    u32 table;  // of nested_code
    float offset;
};

#if DIRECT
// The codes of a row's four scales in a slice, and their nested scale.
struct RowScales {
    u32 codes;
    float unit;
};
FB_DEVICE RowScales row_scales(Slot slot, u32 row) {
    u32 codes = slot.scales + SIDE_CODES, nested = slot.scales + SIDE_NESTED;
    return RowScales{shared_load(codes + 4 * row), float_of(shared_load(nested + 4 * row))};
}
// Scale i of the four; the product is rounded before the sum, as the format says.
FB_DEVICE float scale_of(RowScales row, u32 i, ScaleTable s) {
    u32 at = (i == 0 ? row.codes << 2 : row.codes >> (8 * i - 2 & 31)) & 0x3fcu;
    return add_rn(mul_rn(float_of(shared_load(s.table + at)), row.unit), s.offset);
}
#endif

// Turns the codes of a slice's scales into scales; the product is rounded before the sum, as the format says.
FB_DEVICE void decode_scales(const Weight& w, Slot slot, ScaleTable s, u32 first, u32 k, u32 lane) {
#if NESTED && !DIRECT
    const u32 codes = slot.scales + SIDE_CODES, nested = slot.scales + SIDE_NESTED;
#pragma unroll
    for (u32 i = 0; i < (ROWS * SCALES + 31) / 32; ++i) {
        u32 at = i * 32 + lane, row = at / SCALES, part = at % SCALES;
        if (at < ROWS * SCALES) {
            u32 index = (first + row) * w.row_scales + k / BLOCKSIZE;
            u32 code = shared_load8(codes + 4 * WORDS * row + (EVEN && SCALES % 4 == 0 ? 0 : index & 3) + part);
            u32 entry = NESTED_WORDS == 1 ? 0 : (index + part >> 8) - (index >> 8);
            float unit = float_of(shared_load(nested + 4 * (NESTED_WORDS * row + entry)));
            float scale = add_rn(mul_rn(float_of(shared_load(s.table + 4 * code)), unit), s.offset);
            bool inside = EVEN || k + part * BLOCKSIZE < w.k;
            shared_store(slot.scales + 4 * at, inside ? bits_of(scale) : 0);
        }
    }
    wave_barrier();
#endif
}

// Fills the table, and that of the nested scales.
FB_DEVICE void fill_tables(u32 window, const float* code, const float* nested_code, u32 thread, u32 lane) {
    for (u32 entry = thread; entry < 256; entry += THREADS) {
        u32 pair = DTYPE == FB_BF16 ? floats_to_bf16x2(code[entry >> 4], code[entry & 15])
                                    : floats_to_f16x2(code[entry >> 4], code[entry & 15]);
#pragma unroll
        for (u32 i = 0; i < 8; ++i)
            shared_store4(window + TABLE_AT + entry * ENTRY_BYTES + (i + lane & 7) * 16, pair);
    }
#if NESTED
    for (u32 i = thread; i < 256; i += THREADS) shared_store(window + CODES_AT + 4 * i, bits_of(nested_code[i]));
#endif
}

// The table's entry of byte i of `word`. `lane4`: four times the lane, and the window in the upper bytes.
FB_DEVICE u32 decode(u32 lane4, u32 word, int i) {
#if WIDE
    return shared_constant(permute_bytes(word, lane4, 0x7604 | i << 4));
#else
    u32 offset = i == 0 ? word << 7 : word >> (8 * i - 7 & 31);
    return shared_constant((offset & 0x7f80u) | lane4);
#endif
}
