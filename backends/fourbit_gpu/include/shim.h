// What the kernels take from a vendor, and nothing else: NVRTC's wheel and hipRTC both come without headers.
//
// Types, loads and stores of whole vectors, conversions with one rounding to nearest even, float32 arithmetic that
// no compiler may contract, and shuffles. The host defines FB_ARCH (such as 900) and, under HIP, FB_WAVE.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#if defined(__HIP__) || defined(__HIPCC_RTC__)
#define FB_HIP 1
#else
#define FB_HIP 0
#endif

#if !FB_HIP
#define FB_WAVE 32
#endif

#define FB_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#define FB_DEVICE static __device__ __forceinline__

// ---- vectors ------------------------------------------------------------------------------------------------

struct __attribute__((aligned(8))) u32x2 {
    u32 x, y;
};
struct __attribute__((aligned(16))) u32x4 {
    u32 x, y, z, w;
};

// Loads of what is read once, past the first-level cache's keeping.
#if FB_HIP
FB_DEVICE u32 load_once(const u32* p) { return __builtin_nontemporal_load(p); }
FB_DEVICE u32x4 load_once(const u32x4* p) { return *p; }
#else
FB_DEVICE u32 load_once(const u32* p) {
    u32 v;
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
FB_DEVICE u32x4 load_once(const u32x4* p) {
    u32x4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}
#endif

// ---- float32, rounded after each operation -------------------------------------------------------------------

FB_DEVICE u32 bits_of(float v) { return __builtin_bit_cast(u32, v); }
FB_DEVICE float float_of(u32 v) { return __builtin_bit_cast(float, v); }

#if FB_HIP
FB_DEVICE float mul_rn(float a, float b) {
#pragma clang fp contract(off)
    return a * b;
}
FB_DEVICE float add_rn(float a, float b) {
#pragma clang fp contract(off)
    return a + b;
}
FB_DEVICE float reciprocal_rn(float a) { return 1.0f / a; }
FB_DEVICE float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
FB_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
FB_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
FB_DEVICE float reciprocal_rn(float a) { return __frcp_rn(a); }
FB_DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
#endif

FB_DEVICE u32 max_u32(u32 a, u32 b) { return a > b ? a : b; }

// The larger of each half.
#if !FB_HIP && FB_ARCH >= 900
FB_DEVICE u32 max_u16x2(u32 a, u32 b) {
    u32 v;
    asm("max.u16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
}
#else
FB_DEVICE u32 max_u16x2(u32 a, u32 b) {
    return max_u32(a & 0xffff0000u, b & 0xffff0000u) | max_u32(a & 0xffffu, b & 0xffffu);
}
#endif

// ---- 16-bit floats as u16 -------------------------------------------------------------------------------------

FB_DEVICE float bf16_to_float(u32 low_half) { return float_of(low_half << 16); }

FB_DEVICE u32 bf16_rounded_in_software(float v) {
    u32 b = bits_of(v);
    return (b & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
}

#if FB_HIP
FB_DEVICE float f16_to_float(u32 low_half) { return (float)__builtin_bit_cast(_Float16, (u16)low_half); }
FB_DEVICE u32 float_to_f16(float v) {
    // Keeps a product before it out of v_fma_mixlo_f16, which adds +0 and so turns -0 into +0.
    asm("" : "+v"(v));
    return __builtin_bit_cast(u16, (_Float16)v);
}
FB_DEVICE u32 float_to_bf16(float v) { return bf16_rounded_in_software(v); }
FB_DEVICE u32 floats_to_f16x2(float low, float high) { return float_to_f16(low) | float_to_f16(high) << 16; }
FB_DEVICE u32 floats_to_bf16x2(float low, float high) { return float_to_bf16(low) | float_to_bf16(high) << 16; }
#else
FB_DEVICE float f16_to_float(u32 low_half) {
    float v;
    asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(v) : "r"(low_half));
    return v;
}
FB_DEVICE u32 float_to_f16(float v) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
    return h;
}
#if FB_ARCH >= 800
FB_DEVICE u32 float_to_bf16(float v) {
    u16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v));
    return h;
}
FB_DEVICE u32 floats_to_f16x2(float low, float high) {
    u32 v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
FB_DEVICE u32 floats_to_bf16x2(float low, float high) {
    u32 v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
#else
FB_DEVICE u32 float_to_bf16(float v) { return bf16_rounded_in_software(v); }
FB_DEVICE u32 floats_to_f16x2(float low, float high) { return float_to_f16(low) | float_to_f16(high) << 16; }
FB_DEVICE u32 floats_to_bf16x2(float low, float high) { return float_to_bf16(low) | float_to_bf16(high) << 16; }
#endif
#endif

// The dtype of the floating-point side, chosen by -DDTYPE.
#define FB_F32 0
#define FB_BF16 1
#define FB_F16 2

// ---- lanes ----------------------------------------------------------------------------------------------------

// The value of the lane whose number differs in the bits of `mask`; every lane of the wave takes part.
#if FB_HIP
FB_DEVICE u32 lane_id() { return __builtin_amdgcn_mbcnt_hi(FB_WAVE == 64 ? ~0u : 0u, __builtin_amdgcn_mbcnt_lo(~0u, 0)); }
FB_DEVICE u32 shuffle_xor(u32 v, int mask) {
    return (u32)__builtin_amdgcn_ds_bpermute((int)(lane_id() ^ (u32)mask) << 2, (int)v);
}
#else
FB_DEVICE u32 shuffle_xor(u32 v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
#endif

// The same value, which the compiler has to take for one that differs from lane to lane: what is derived from it is kept
// in vector registers, where the scalar ones of AMD's GPUs would run out.
#if FB_HIP
FB_DEVICE u32 per_lane(u32 v) {
    asm("" : "+v"(v));
    return v;
}
#else
FB_DEVICE u32 per_lane(u32 v) { return v; }
#endif

#if FB_HIP
FB_DEVICE void block_barrier() {
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");  // the barrier alone orders no memory
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
#else
FB_DEVICE void block_barrier() { __syncthreads(); }
#endif

// How many of the block's threads say yes; a barrier.
#if FB_HIP
FB_DEVICE u32 block_count(bool yes) {
    __shared__ u32 counts[1024 / FB_WAVE];
    const u32 waves = (blockDim.x + FB_WAVE - 1) / FB_WAVE;
    const u64 votes = __builtin_amdgcn_uicmp((u32)yes, 0u, 33);  // 33: not equal; one bit for each lane
    if (threadIdx.x % FB_WAVE == 0) counts[threadIdx.x / FB_WAVE] = (u32)__builtin_popcountll(votes);
    block_barrier();
    u32 total = 0;
    for (u32 i = 0; i < waves; ++i) total += counts[i];
    block_barrier();  // before a later call writes again
    return total;
}
#else
FB_DEVICE u32 block_count(bool yes) { return (u32)__syncthreads_count(yes); }
#endif

// ---- failure --------------------------------------------------------------------------------------------------

// Ends the kernel, and with it the process's use of the device, as an assertion of torch's own kernels does.
#if FB_HIP
FB_DEVICE void device_fail(const char*, const char*, u32) { __builtin_trap(); }
#else
extern "C" __device__ __attribute__((noreturn)) void __assertfail(const char*, const char*, unsigned, const char*,
                                                                  unsigned long);
FB_DEVICE void device_fail(const char* what, const char* file, u32 line) {
    __assertfail(what, file, line, "fourbit", 1);
}
#endif
