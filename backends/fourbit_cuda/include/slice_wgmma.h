// A slice's products on wgmma: groups of four warps, the weight in registers, x read from shared memory by the unit.
//
// x lies there as arrange_x.cu put it: for each 64 elements of k, four products, each two columns of 8 x 16-byte core
// matrices, without swizzle.
#pragma once
#include "share.h"

#ifndef DEPTH
#define DEPTH (WARPS > 8 ? 1 : 2)  // products in flight; with fewer warps one works while the next is decoded
#endif

#if DTYPE == FB_BF16
#define WGMMA_TYPES "bf16.bf16"
#else
#define WGMMA_TYPES "f16.f16"
#endif

// Where x's [COLUMNS, 16] operand lies: its address, and the distances between core matrices along k and along rows.
FB_DEVICE u64 operand(u32 at) {
    u32 low = (at >> 4 & 0x3fff) | (u32)COLUMNS << 16;
    return (u64)(128 >> 4) << 32 | low;
}

// d = a x (first) or d += a x, started and not waited for. `a`, `d`: as for multiply() of matrix.h.
FB_DEVICE void start(float (&d)[NT][4], const u32 (&a)[4], u64 x, int first) {
#if NT == 2
    asm volatile(
        "{ .reg .pred more; setp.eq.s32 more, %13, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32." WGMMA_TYPES " {"
        "%0, %1, %2, %3, %4, %5, %6, %7"
        "}, {%8, %9, %10, %11}, %12, more, 1, 1, 0; }"
        : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),
          "+f"(d[1][2]), "+f"(d[1][3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(first));
#elif NT == 4
    asm volatile(
        "{ .reg .pred more; setp.eq.s32 more, %21, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." WGMMA_TYPES " {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
        "}, {%16, %17, %18, %19}, %20, more, 1, 1, 0; }"
        : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),
          "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
          "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(first));
#elif NT == 8
    asm volatile(
        "{ .reg .pred more; setp.eq.s32 more, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." WGMMA_TYPES " {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
        "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, more, 1, 1, 0; }"
        : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),
          "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
          "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]),
          "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
          "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]),
          "+f"(d[7][2]), "+f"(d[7][3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(first));
#else
#error "NT must be 2, 4 or 8"
#endif
}
FB_DEVICE void start_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FB_DEVICE void start_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `pending` groups are in flight, of which `d` is none.
template <int pending>
FB_DEVICE void start_wait(float (&d)[NT][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) asm volatile("" : "+f"(d[n][c])::"memory");
}

typedef u32 Place;  // where a warp's part of a slice of x starts

// One slice of a warp: sums += weight slice times x slice.
FB_DEVICE void multiply_slice(float (&sums)[RT][NT][4], Slot slot, u32 table, Place x, ScaleTable s, u32 lane) {
    const u64 x_slice = operand(same_in_wave(x));
    const u32 g = lane / 4, t = lane % 4;
    const int units = KW / 64 * RT * PARTS;  // one quantization block (or 64 elements of it) of 16 rows each
#if DIRECT
    RowScales rows[RT][2];
#pragma unroll
    for (int r = 0; r < RT; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) rows[r][half] = row_scales(slot, 16 * r + 8 * half + g);
#endif
    u32 a[DEPTH][4 / PARTS][4];
    float d[DEPTH][NT][4], scale[DEPTH][2];
#pragma unroll(DEPTH == 1 && RT == 1 && NT >= 8 ? 1 : units + DEPTH - 1)
    for (int i = 0; i < units + DEPTH - 1; ++i) {
        if (i < units) {
            const int part = i / (RT * PARTS), p = i / RT % PARTS, r = i % RT;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                u32 row = 16 * r + 8 * half + g;
#if PARTS == 1
                u32x2 bytes = shared_load2(slot.rows + piece_offset(row, 2 * part + t / 2) + t % 2 * 8);
#else
                u32x2 bytes = {shared_load(slot.rows + piece_offset(row, 2 * part + p) + 4 * t), 0};
#endif
#pragma unroll
                for (int j = 0; j < 4 / PARTS; ++j) {
                    u32 word = j < 2 ? bytes.x : bytes.y;
                    a[i % DEPTH][j][half] = decode(table, word, j % 2 * 2);
                    a[i % DEPTH][j][half + 2] = decode(table, word, j % 2 * 2 + 1);
                }
#if DIRECT
                scale[i % DEPTH][half] = scale_of(rows[r][half], part, s);
#else
                scale[i % DEPTH][half] =
                    float_of(shared_load(slot.scales + 4 * (row * SCALES + (64 * part + 32 * p) / BLOCKSIZE)));
#endif
            }
            start_fence();
#pragma unroll
            for (int j = 0; j < 4 / PARTS; ++j)
                start(d[i % DEPTH], a[i % DEPTH][j], x_slice + (part * 4 + p * 2 + j) * (2 * COLUMNS), j == 0);
            start_commit();
        }
        if (i >= DEPTH - 1) {
            const int last = (i - DEPTH + 1) % DEPTH, r = (i - DEPTH + 1) % RT;
            if (i < units) start_wait<DEPTH - 1>(d[last]);
            else start_wait<0>(d[last]);
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                sums[r][n][0] += scale[last][0] * d[last][n][0];
                sums[r][n][1] += scale[last][0] * d[last][n][1];
                sums[r][n][2] += scale[last][1] * d[last][n][2];
                sums[r][n][3] += scale[last][1] * d[last][n][3];
            }
        }
    }
}
