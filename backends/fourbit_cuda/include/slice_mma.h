// A slice's products on mma.sync: x in shared memory row by row, read into registers.
#pragma once
#include "share.h"

#ifndef UNROLL
#define UNROLL (RT * NT >= 8 ? 1 : KW / 64)  // how much the compiler may overlap, as registers allow
#endif

// Where a lane reads x: its row in each n8 tile.
typedef u32 Place[NT];

// In a slice that starts at `ring`, rows `stride` bytes apart; those past the end repeat the last.
FB_DEVICE void locate(Place& place, const Share& s, u32 ring, u32 stride, u32 columns) {
#pragma unroll
    for (int i = 0; i < NT; ++i) {
        u32 m = 8 * i + s.lane / 4;
        place[i] = ring + (m < columns ? m : columns - 1) * stride + s.wk * (2 * KW);
    }
}
FB_DEVICE void move(Place& to, const Place& from, u32 bytes) {
#pragma unroll
    for (int i = 0; i < NT; ++i) to[i] = from[i] + bytes;
}

// One slice of a warp: sums += weight slice times x slice. `x`: where its first element is.
FB_DEVICE void multiply_slice(float (&sums)[RT][NT][4], Slot slot, u32 table, const Place& x, ScaleTable s,
                              u32 lane) {
    u32 g = lane / 4, t = lane % 4;
#if DIRECT
    RowScales rows[RT][2];
#pragma unroll
    for (int r = 0; r < RT; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) rows[r][half] = row_scales(slot, 16 * r + 8 * half + g);
#endif
#pragma unroll UNROLL
    for (int part = 0; part < KW / 64; ++part) {
        u32 a[RT][4][4];
#pragma unroll
        for (int r = 0; r < RT; ++r) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                u32 row = 16 * r + 8 * half + g;
#if PARTS == 1
                u32x2 bytes = shared_load2(slot.rows + piece_offset(row, 2 * part + t / 2) + t % 2 * 8);
#else
                u32x2 bytes = {shared_load(slot.rows + piece_offset(row, 2 * part) + 4 * t),
                               shared_load(slot.rows + piece_offset(row, 2 * part + 1) + 4 * t)};
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
#if DIRECT
                    scale[r][half][p] = scale_of(rows[r][half], part, s);
#else
                    u32 index = (64 * part + 32 * p) / BLOCKSIZE;
                    u32 at = (16 * r + 8 * half + g) * SCALES + index;
                    scale[r][half][p] = float_of(shared_load(slot.scales + 4 * at));
#endif
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
