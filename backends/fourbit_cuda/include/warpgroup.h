// sm_90a: products of a warpgroup (four warps), tiles brought to shared memory by the copy engine, and the matrices of
// 16-bit results on their way out.
#pragma once
#include "matrix.h"

// A CUtensorMap, which the host encodes: what a copy of a tile needs to know of the matrix.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

// Starts the copy of the tile whose first element is (`column`, `row`); its bytes count on `barrier`.
FB_DEVICE void copy_tile(u32 to, const TensorMap& map, u32 column, u32 row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(&map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}
FB_DEVICE void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// After all barrier_init, for other threads and the copy engine.
FB_DEVICE void barriers_made() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    async_fence();
}
// One arrival, and so many bytes that the phase waits for.
FB_DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// An arrival of the threads with `who`, without a branch.
FB_DEVICE void barrier_arrive(u32 barrier, bool who) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0;\n@p mbarrier.arrive.shared.b64 _, [%0]; }" ::"r"(barrier),
                 "r"((u32)who)
                 : "memory");
}

// Whether it holds for a lane, and so for all of them, which the compiler gets to know: what depends on it can stay in
// uniform registers, as products want them.
FB_DEVICE bool same_in_wave(bool v) { return __any_sync(0xffffffffu, v); }

// Registers of a thread: a warpgroup gives some back, or takes more.
template <int count>
FB_DEVICE void registers_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
FB_DEVICE void registers_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// A barrier of one warpgroup.
FB_DEVICE void group_barrier(u32 id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }

// A barrier of the two that multiply.
FB_DEVICE void products_barrier() { asm volatile("bar.sync 3, 256;" ::: "memory"); }

// ---- products -----------------------------------------------------------------------------------------------
//
// Operands in shared memory are rows of 128 bytes, of which the hardware expects 16-byte pieces exchanged: piece ^ row % 8.
// Groups of eight rows are 1024 bytes apart; `at` is 1024-byte aligned, or the start of 16 elements in the first row.
FB_DEVICE u64 operand_rows(u32 at) { return 1ull << 62 | 64ull << 32 | 64ull << 16 | (at >> 4 & 0x3fffu); }

#if DTYPE == FB_BF16
#define PRODUCT_TYPES "bf16.bf16"
#else
#define PRODUCT_TYPES "f16.f16"
#endif
#define TEXT(macro) TEXT_OF(macro)
#define TEXT_OF(text) #text
#define PRODUCT "wgmma.mma_async.sync.aligned.m64n" TEXT(COLUMNS) "k16.f32." PRODUCT_TYPES " "

#define SUMS4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define SUMS16(i) SUMS4(i), SUMS4(i + 1), SUMS4(i + 2), SUMS4(i + 3)
#define SUMS32(i) SUMS16(i), SUMS16(i + 4)
#define NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                                  \
    NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
             "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_96                                                                                                  \
    NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, " \
             "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_128                                                                                                     \
    NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, "                                                               \
             "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, " \
             "%120, %121, %122, %123, %124, %125, %126, %127"
// The sums of a tile of so many columns, their names, and those of what an instruction has after them.
#if COLUMNS == 32
#define SUMS SUMS16(0)
#define NAMES NAMES_16
#define WITH(form) form("%16", "%17", "%18", "%19", "%20", "%21")
#elif COLUMNS == 64
#define SUMS SUMS32(0)
#define NAMES NAMES_32
#define WITH(form) form("%32", "%33", "%34", "%35", "%36", "%37")
#elif COLUMNS == 128
#define SUMS SUMS32(0), SUMS32(8)
#define NAMES NAMES_64
#define WITH(form) form("%64", "%65", "%66", "%67", "%68", "%69")
#elif COLUMNS == 192
#define SUMS SUMS32(0), SUMS32(8), SUMS32(16)
#define NAMES NAMES_96
#define WITH(form) form("%96", "%97", "%98", "%99", "%100", "%101")
#elif COLUMNS == 256
#define SUMS SUMS32(0), SUMS32(8), SUMS32(16), SUMS32(24)
#define NAMES NAMES_128
#define WITH(form) form("%128", "%129", "%130", "%131", "%132", "%133")
#else
#error "COLUMNS must be 32, 64, 128, 192 or 256"
#endif
#define FROM_REGISTERS(a0, a1, a2, a3, x, more) \
    "{ .reg .pred p; setp.ne.u32 p, " more ", 0;\n" PRODUCT "{" NAMES "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " x ", p, 1, 1, 0; }"
#define FROM_TRANSPOSED(a, x, more, ...) \
    "{ .reg .pred p; setp.ne.u32 p, " more ", 0;\n" PRODUCT "{" NAMES "}, " a ", " x ", p, 1, 1, 1, 0; }"

// d [64, COLUMNS] = (`more`: +=) a [64, 16] times x [COLUMNS, 16] transposed; started, and not waited for.
//
// a in registers: lane 4 g + t of warp w has of the rows 16 w + g (a[0], a[2]) and 16 w + g + 8 (a[1], a[3]) the elements
// 2 t, 2 t + 1 (a[0], a[1]) and 2 t + 8, 2 t + 9 (a[2], a[3]).
FB_DEVICE void start_product(float (&d)[COLUMNS / 8][4], const u32 (&a)[4], u64 x, u32 more) {
    asm volatile(WITH(FROM_REGISTERS) : SUMS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(more));
}
// a in shared memory, as [16, 64].
FB_DEVICE void start_product(float (&d)[COLUMNS / 8][4], u64 a, u64 x, u32 more) {
    asm volatile(WITH(FROM_TRANSPOSED) : SUMS : "l"(a), "l"(x), "r"(more));
}
FB_DEVICE void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FB_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `pending` of the committed groups are in flight.
template <int pending>
FB_DEVICE void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Where the value is, and not before, it has been computed: products write their sums behind the compiler's back, and
// results follow one another as registers allow.
FB_DEVICE void settle(float& v) { asm volatile("" : "+f"(v)::"memory"); }
// Likewise of an operand, which products read behind the compiler's back.
FB_DEVICE void settle(u32& v) { asm volatile("" : "+r"(v)::"memory"); }

// Four matrices of 8 x 8 16-bit values, transposed: lane 8 i + j gives the address of matrix i's column j as a row.
FB_DEVICE void store_transposed(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

FB_DEVICE void shared_store4(u32 p, u32x4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Of what lies at `p` + offset.
template <int offset>
FB_DEVICE u32x2 shared_load2_at(u32 p) {
    u32x2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2 + %3];" : "=r"(v.x), "=r"(v.y) : "r"(p), "n"(offset));
    return v;
}

template <int offset>
FB_DEVICE u32 shared_load_at(u32 p) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(v) : "r"(p), "n"(offset));
    return v;
}
// Of two bfloat16 in a register each: a * b, and a * b + c rounded once.
FB_DEVICE u32 multiply2(u32 a, u32 b) {
    u32 v;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
}
FB_DEVICE u32 multiply_add2(u32 a, u32 b, u32 c) {
    u32 v;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));
    return v;
}

FB_DEVICE u32 permute(u32 low, u32 high, u32 selector) {
    u32 v;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(low), "r"(high), "r"(selector));
    return v;
}

// Where `p` of this block is in the cluster's block `rank`, and a store there whose bytes count on a barrier of that block.
FB_DEVICE u32 cluster_address(u32 p, u32 rank) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(p), "r"(rank));
    return there;
}
FB_DEVICE void cluster_send4(u32 p, u32x4 v, u32 barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(p),
                 "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier)
                 : "memory");
}
