// Results in DTYPE: one rounding from float32, to nearest even.
#pragma once
#include "shim.h"

FB_DEVICE void store1(void* out, i64 i, float x) {
#if DTYPE == FB_F32
    ((float*)out)[i] = x;
#else
    ((u16*)out)[i] = (u16)(DTYPE == FB_BF16 ? float_to_bf16(x) : float_to_f16(x));
#endif
}

FB_DEVICE u32 pair(float low, float high) {
    return DTYPE == FB_BF16 ? floats_to_bf16x2(low, high) : floats_to_f16x2(low, high);
}

// Elements i … i + 7; out + i must be 16-byte aligned.
FB_DEVICE void store8(void* out, i64 i, const float (&x)[8]) {
#if DTYPE == FB_F32
    u32x4* vector = (u32x4*)((float*)out + i);
    vector[0] = u32x4{bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])};
    vector[1] = u32x4{bits_of(x[4]), bits_of(x[5]), bits_of(x[6]), bits_of(x[7])};
#else
    *(u32x4*)((u16*)out + i) = u32x4{pair(x[0], x[1]), pair(x[2], x[3]), pair(x[4], x[5]), pair(x[6], x[7])};
#endif
}
