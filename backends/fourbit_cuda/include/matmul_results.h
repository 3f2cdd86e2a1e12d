// Results on their way out: the sums of blocks that share a tile, one rounding, and rows of y through shared memory.
#pragma once
#include "matmul_work.h"

#define NT (COLUMNS / 8)  // blocks of eight rows of x
#define RESULT_BYTES (RESULT_COLUMNS * 128)  // of a warpgroup's buffer

// Writes COUNT blocks of eight rows of x, from block `first` on, of a warpgroup's 64 outputs.
template <int COUNT>
FB_DEVICE void write_results(const float (&sums)[COUNT][4], const int first, u32 buffer, const Tile& t, u32 group,
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
                const float(&d)[4] = sums[i + j + c / 2];
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

// Of a warpgroup's 64 outputs of a tile; what the cluster shares is added up at `exchange`, where nothing lies any more as
// soon as all of it are here. That happens once in a launch.
FB_DEVICE void finish_tile(const float (&sums)[NT][4], const Problem& p, const Tile& t, bool shares, u32 shared, u32 exchange,
                           u32 buffer, u32 group, u32 thread, const u16* bias, u16* y) {
#if SPLIT > 1
    if (shares) {  // each of the two blocks finishes a warpgroup's outputs: it gets the other's sums of these
        const u32 rank = p.block % SPLIT, owner = group % SPLIT, mine = exchange + thread * 16;
        constexpr u32 at_a_time = NT / EXCHANGES;
        __syncwarp();
        cluster_meet();
        if (owner != rank) {
            const u32 to = cluster_address(mine, owner);
#pragma unroll
            for (u32 i = 0; i < NT; ++i) {
                const float(&d)[4] = sums[i];
                cluster_send4(to + i * (GROUP * 16), u32x4{bits_of(d[0]), bits_of(d[1]), bits_of(d[2]), bits_of(d[3])},
                              cluster_address(exchange_barrier(shared, i / at_a_time), owner));
            }
            return;
        }
#pragma unroll
        for (u32 first = 0; first < NT; first += at_a_time) {
            barrier_wait(exchange_barrier(shared, first / at_a_time), 0);
            float both[at_a_time][4];  // in sums themselves, the compiler would let products wait for one another
#pragma unroll
            for (u32 i = 0; i < at_a_time; ++i) {
                const u32x4 v = shared_load4(mine + (first + i) * (GROUP * 16));
                const float other[4] = {float_of(v.x), float_of(v.y), float_of(v.z), float_of(v.w)};
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    both[i][c] = sums[first + i][c] + other[c];
                    settle(both[i][c]);
                }
            }
            write_results<at_a_time>(both, first, buffer, t, group, thread, bias, y, p.outputs);
        }
        return;
    }
#endif
    write_results<NT>(sums, 0, buffer, t, group, thread, bias, y, p.outputs);
}
