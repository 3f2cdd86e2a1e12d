// Small kernels, right and wrong, that the emulator's own tests run. Compiled by clang or hipRTC.
#include "shim.h"

// Each work item gives its value to its neighbour in another wave.
FB_KERNEL(256) exchange(const u32* in, u32* out) {
    __shared__ u32 place[256];
    place[threadIdx.x] = in[threadIdx.x];
    block_barrier();
    out[threadIdx.x] = place[threadIdx.x ^ 128];
}

FB_KERNEL(256) exchange_without_barrier(const u32* in, u32* out) {
    __shared__ u32 place[256];
    place[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = place[threadIdx.x ^ 128];
}

FB_KERNEL(256) barrier_for_some(const u32* in, u32* out) {
    __shared__ u32 place[256];
    place[threadIdx.x] = in[threadIdx.x];
    if (threadIdx.x < 128) block_barrier();
    out[threadIdx.x] = place[threadIdx.x];
}

FB_KERNEL(256) reads_unwritten_lds(const u32* in, u32* out) {
    __shared__ u32 place[256];
    if (threadIdx.x != 77) place[threadIdx.x] = in[threadIdx.x];
    block_barrier();
    out[threadIdx.x] = place[threadIdx.x ^ 128];
}

FB_KERNEL(256) reads_unwritten_register(const u32* in, u32* out) {
    u32 value;
    asm volatile("" : "=v"(value));  // claims to write
    out[threadIdx.x] = in[threadIdx.x] + value;
}

FB_KERNEL(256) writes_past_the_end(const u32* in, u32* out) { out[threadIdx.x + 1] = in[threadIdx.x]; }

FB_KERNEL(256) all_write_one_value(const u32* in, u32* out) {
    __shared__ u32 place;
    place = 5;
    block_barrier();
    out[threadIdx.x] = in[threadIdx.x] + place;
}

FB_KERNEL(256) all_write_their_own(const u32* in, u32* out) {
    __shared__ u32 place;
    place = in[threadIdx.x];
    block_barrier();
    out[threadIdx.x] = place;
}

FB_KERNEL(256) diverges(const u32* in, u32* out) {
    u32 v = in[threadIdx.x], steps = 0;
    while (v != 1) v = v % 2 ? 3 * v + 1 : v / 2, ++steps;
    out[threadIdx.x] = steps;
}

FB_KERNEL(256) divides(const float* in, float* out) { out[threadIdx.x] = in[2 * threadIdx.x] / in[2 * threadIdx.x + 1]; }

FB_KERNEL(256) counts(const u32* in, u32* out) { out[threadIdx.x] = block_count(in[threadIdx.x] % 3 == 0); }

FB_KERNEL(256) traps(const u32* in, u32* out) {
    if (in[threadIdx.x] == 9) device_fail("nine", __FILE__, __LINE__);
    out[threadIdx.x] = 0;
}

FB_KERNEL(256) to_half(const float* in, u32* out) { out[threadIdx.x] = float_to_f16(mul_rn(in[2 * threadIdx.x], in[2 * threadIdx.x + 1])); }

// The grid is read from hidden arguments or from the dispatch packet.
FB_KERNEL(256) geometry(const u32* in, u32* out) {
    if (threadIdx.x == 0) out[blockIdx.y * gridDim.x + blockIdx.x] = gridDim.x * 1000 + blockDim.x + in[0];
}

// Of pairs a and b, (a.y, b.x): one packed move on CDNA 2 and newer.
typedef float pair_t __attribute__((ext_vector_type(2)));
FB_KERNEL(256) shuffles(const pair_t* in, pair_t* out) {
    pair_t a = in[2 * threadIdx.x], b = in[2 * threadIdx.x + 1];
    out[threadIdx.x] = __builtin_shufflevector(a, b, 1, 2) * b;
}
