// Lays x out for linear_mma.cu with WGMMA: as wgmma reads it, in the order of k in which the weight is decoded.
//
// Defines: BLOCKSIZE, COLUMNS (rows of x that one block of linear_mma takes). DTYPE does not matter: 16 bits move.
#include "matrix.h"

#define THREADS 256

// x [m, k]; out [ceil(m / COLUMNS), parts, 4 products, 2 core matrices along k, COLUMNS, 8] of 16 bits, parts of 64
// elements; what lies past x's last row or element is zero. k % 64 == 0, x 4-byte aligned; pieces: out's bytes / 16.
FB_KERNEL(THREADS) arrange_x(const u16* x, u16* out, i64 m, i64 k, i64 parts, i64 pieces) {
    let_next_start();  // to ask for its weights early; it waits for the end of this
    after_previous();
    i64 piece = (i64)blockIdx.x * THREADS + threadIdx.x;  // of 16 bytes in out; neighbours read neighbouring bytes
    if (piece >= pieces) return;
    const u32 c = piece & 1, j = piece >> 1 & 3;
    const i64 part = (piece >> 3) % parts, row = (piece >> 3) / parts;
    u32x4 v = {0, 0, 0, 0};
    if (row < m && part * 64 < k) {
        const u32* from = (const u32*)(x + row * k + part * 64);  // two elements each
#if BLOCKSIZE == 32
        from += 16 * (j / 2) + 2 * (j % 2) + c;
        v = u32x4{from[0], from[4], from[8], from[12]};
#else
        from += 2 * j + c;
        v = u32x4{from[0], from[8], from[16], from[24]};
#endif
    }
    const i64 tile = row / COLUMNS, column = row % COLUMNS;
    ((u32x4*)out)[(((tile * parts + part) * 4 + j) * 2 + c) * COLUMNS + column] = v;
}
