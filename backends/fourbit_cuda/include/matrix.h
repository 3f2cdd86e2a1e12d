// Asynchronous copies into shared memory, and the matrix units: m16n8k16 products of 16-bit floats in float32.
//
// Shared memory is addressed by u32 here: the offset in the block's window.
#pragma once
#include "shim.h"

// Where dynamic shared memory starts in a block's window if there is no static: what the driver keeps lies before it.
#define SHARED_BASE (FB_ARCH >= 900 ? 1024 : 0)

FB_DEVICE void trap() { asm volatile("trap;"); }
FB_DEVICE u32 permute_bytes(u32 low, u32 high, u32 selector) { return __byte_perm(low, high, selector); }
// The value of lane 0, in all lanes; tells the compiler that it is the same in all.
FB_DEVICE u32 same_in_wave(u32 v) { return __shfl_sync(0xffffffffu, v, 0); }

FB_DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ---- copies: of 16 or 4 bytes; `bytes` less than that fills the rest with zeros ------------------------------

FB_DEVICE void copy16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
FB_DEVICE void copy16(u32 to, const void* from, u32 bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
FB_DEVICE void copy8(u32 to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}
FB_DEVICE void copy4(u32 to, const void* from, u32 bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
// Ends a group of copies; the groups complete in order.
FB_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's groups are in flight.
template <int pending>
FB_DEVICE void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

FB_DEVICE void wave_barrier() { __syncwarp(); }

// ---- shared memory ------------------------------------------------------------------------------------------

FB_DEVICE u32 shared_load(u32 p) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(p));
    return v;
}
FB_DEVICE u32 shared_load8(u32 p) {
    u32 v;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(p));
    return v;
}
FB_DEVICE u32x2 shared_load2(u32 p) {
    u32x2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(p));
    return v;
}
FB_DEVICE u32x4 shared_load4(u32 p) {
    u32x4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(p));
    return v;
}
// Of what never changes while the kernel reads it: the compiler may move these. `p` counts from SHARED_BASE.
FB_DEVICE u32 shared_constant(u32 p) {
    u32 v;
#if FB_ARCH >= 900
    asm("ld.shared.u32 %0, [%1 + 1024];" : "=r"(v) : "r"(p));
#else
    asm("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(p));
#endif
    return v;
}
FB_DEVICE void shared_store(u32 p, u32 v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(p), "r"(v) : "memory"); }
FB_DEVICE void shared_store4(u32 p, u32 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(p), "r"(v) : "memory");
}

// ---- products -----------------------------------------------------------------------------------------------

// d += a [16, 16] times b [16, 8]. Lane 4 g + t holds of a the rows g and g + 8, of b the column g, of d the columns
// 2 t and 2 t + 1. Which 16 elements of the inner dimension a lane's registers stand for is free, as long as a and b
// agree: here a0 and a1 (rows g, g + 8) pair with b0, a2 and a3 with b1.
FB_DEVICE void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if DTYPE == FB_BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#elif FB_ARCH >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// ---- sm_90: the launch before and after, and blocks of a cluster ----------------------------------------------

// Memory that will soon be read comes into the second-level cache. Reads nothing: safe before after_previous().
FB_DEVICE void prefetch(const void* p, u32 bytes) {
#if FB_ARCH >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes));
#endif
}
FB_DEVICE void prefetch_line(const void* p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}
// Lets the next launch's blocks start wherever there is room; they wait for this launch's end themselves.
FB_DEVICE void let_next_start() {
#if FB_ARCH >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Waits for the end of the launch before, whose results are then there; so are those before it.
FB_DEVICE void after_previous() {
#if FB_ARCH >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
FB_DEVICE void cluster_barrier() {
#if FB_ARCH >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// The same where nothing that was written has to be seen: without the wait for it.
FB_DEVICE void cluster_meet() {
#if FB_ARCH >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// A float at `p` in the window of the cluster's block `rank`.
FB_DEVICE float cluster_load(u32 p, u32 rank) {
    float v = 0.0f;
#if FB_ARCH >= 900
    asm volatile("{ .reg .u32 a; mapa.shared::cluster.u32 a, %1, %2; ld.shared::cluster.f32 %0, [a]; }"
                 : "=f"(v)
                 : "r"(p), "r"(rank));
#endif
    return v;
}

// ---- sm_90: copies of a whole run of bytes by the copy engine, which count on a barrier in shared memory -------

#if FB_ARCH >= 900
FB_DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
FB_DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Orders this thread's ordinary accesses to shared memory before later ones of the copy engine and wgmma.
FB_DEVICE void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// All three 16-byte aligned; the barrier's phase ends when the bytes have arrived.
FB_DEVICE void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
// Waits for the end of the phase whose number has this parity.
FB_DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{ .reg .pred done;\n"
        "again%=: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again%=; }" ::"r"(barrier),
        "r"(parity)
        : "memory");
}
#endif
