// Experts' rows of x: sorted by expert; expert e ends at offsets[e], and begins where any before it ended last.
#pragma once

struct Offsets {  // int32, or int64
    const void* at;
    bool wide;

    __device__ __forceinline__ i64 operator[](u32 e) const { return wide ? ((const i64*)at)[e] : ((const int*)at)[e]; }
};

struct ExpertRows {
    u32 first, end;  // none where end <= first
};

// A warp's: for lane l those of expert `base` + l. `latest`: where the experts before `base` end, and then those of the
// warp too. Offsets out of order or out of range give no row twice, and none that x does not have.
FB_DEVICE ExpertRows rows_of_experts(const Offsets& offsets, u32 base, u32 experts, u32 rows, u32 lane, u32& latest) {
    const u32 e = base + lane;
    const i64 at = e < experts ? offsets[e] : 0;
    const u32 end = at < 0 ? 0 : at < rows ? (u32)at : rows;
    u32 most = end;  // of this and all before
#pragma unroll
    for (u32 i = 1; i < 32; i *= 2) {
        const u32 other = __shfl_up_sync(0xffffffffu, most, i);
        if (lane >= i && other > most) most = other;
    }
    u32 first = __shfl_up_sync(0xffffffffu, most, 1);
    first = lane == 0 || first < latest ? latest : first;
    const u32 last = __shfl_sync(0xffffffffu, most, 31);
    latest = last > latest ? last : latest;
    return ExpertRows{first, end};
}

// Rows of y [rows, width] from the last expert's on are zeros: this is one part of several of the work, a block's.
FB_DEVICE void clear_rest(u16* y, u32 latest, u32 rows, u32 width, u32 part, u32 parts, u32 thread, u32 threads) {
    const u64 end = (u64)rows * width;
    for (u64 at = (u64)latest * width + (u64)part * threads + thread; at < end; at += (u64)parts * threads) y[at] = 0;
}
