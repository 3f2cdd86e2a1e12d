// Stands in for backends/fourbit_cuda/include/warpgroup.h, so that matmul_*.cu run on a CPU: one thread of the system for
// each of a cluster's, shared memory as bytes, copies done at once where they are started, and products where they are
// waited for: as late as they may be.
//
// What it shows: results, for any shape; that no thread waits for what never comes; operands that are overwritten, and sums
// that are read, before a wait. What it cannot show: a read that comes too early for the copies of the hardware.
#pragma once
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __align__(bytes)
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define FB_DEVICE static inline
#define FB_F32 0
#define FB_BF16 1
#define FB_F16 2

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
struct u32x2 {
    u32 x, y;
};
struct u32x4 {
    u32 x, y, z, w;
};

// ---- threads and their barriers -----------------------------------------------------------------------------------

// Threads that wait for one another: all of a warp, a warpgroup, a block or a cluster.
struct Meeting {
    std::mutex mutex;
    std::condition_variable changed;
    u32 members = 0, waiting = 0, round = 0;

    void meet() {
        std::unique_lock lock(mutex);
        const u32 mine = round;
        if (++waiting == members) {
            waiting = 0, ++round;
            changed.notify_all();
        } else {
            changed.wait(lock, [&] { return round != mine; });
        }
    }
};

struct Mbarrier {
    u32 expected = 0, arrivals = 0, phase = 0;
    long long bytes = 0;
};

struct Warp {
    Meeting all;
    u32 values[32][4], addresses[32];
};

struct Block {
    std::vector<u8> memory;
    std::map<u32, Mbarrier> barriers;
    std::mutex mutex;
    std::condition_variable changed;
    std::vector<std::unique_ptr<Warp>> warps;
    Meeting all, groups[16];
};

struct Cluster {
    std::vector<std::unique_ptr<Block>> blocks;
    Meeting all;
};

struct Index {
    u32 x;
};
inline thread_local Cluster* cluster;
inline thread_local Block* block;
inline thread_local Warp* warp;
inline thread_local u32 cluster_rank;
inline thread_local Index threadIdx, blockIdx, gridDim;
extern u8 shared_[];

#define WINDOW 24  // an address: the block's rank in the cluster, and the byte

[[noreturn]] inline void fail(const char* what, u32 detail) {
    fprintf(stderr, "block %u, thread %u: %s %u\n", blockIdx.x, threadIdx.x, what, detail);
    abort();
}
FB_DEVICE void trap() { fail("trap", 0); }
FB_DEVICE u8* bytes_at(u32 p, u32 count) {
    Block& owner = *cluster->blocks.at(p >> WINDOW);
    const u32 at = p & ((1u << WINDOW) - 1);
    if (at < 1024 || at + count > owner.memory.size() || p % count) fail("shared memory: bad address", p);
    return owner.memory.data() + at;
}
FB_DEVICE u32 shared_address(const void*) { return cluster_rank << WINDOW | 1024; }
FB_DEVICE u32 same_in_wave(u32 v) { return v; }
FB_DEVICE bool same_in_wave(bool v) { return v; }
FB_DEVICE void __syncwarp() { warp->all.meet(); }
FB_DEVICE void block_barrier() { block->all.meet(); }
FB_DEVICE void group_barrier(u32 id) { block->groups[id].meet(); }
FB_DEVICE void products_barrier() { block->groups[3].meet(); }
FB_DEVICE void cluster_barrier() { cluster->all.meet(); }
FB_DEVICE void cluster_meet() { cluster->all.meet(); }
FB_DEVICE void after_previous() {}
FB_DEVICE void let_next_start() {}
FB_DEVICE void async_fence() {}
FB_DEVICE void barriers_made() {}
template <int>
FB_DEVICE void registers_decrease() {}
template <int>
FB_DEVICE void registers_increase() {}

FB_DEVICE u32 exchange(u32 v, int from) {
    const u32 lane = threadIdx.x % 32;
    warp->values[lane][0] = v;
    __syncwarp();
    v = warp->values[from < 0 ? lane : from][0];
    __syncwarp();
    return v;
}
FB_DEVICE u32 __shfl_up_sync(u32, u32 v, u32 by) { return exchange(v, (int)(threadIdx.x % 32) - (int)by); }
FB_DEVICE u32 __shfl_sync(u32, u32 v, u32 from) { return exchange(v, (int)from); }

// ---- mbarriers: those of the own block ----------------------------------------------------------------------------

FB_DEVICE void end_phase_if_complete(Mbarrier& b, Block& owner = *block) {
    if (b.arrivals == b.expected && b.bytes == 0) {
        b.arrivals = 0, b.phase ^= 1;
        owner.changed.notify_all();
    }
}
FB_DEVICE Mbarrier& barrier_at(u32 p) {
    if (p >> WINDOW != cluster_rank) fail("mbarrier of another block", p);
    auto found = block->barriers.find(p);
    if (found == block->barriers.end()) fail("no mbarrier was made at", p);
    return found->second;
}
FB_DEVICE void barrier_init(u32 p, u32 arrivals) {
    bytes_at(p, 8);
    std::lock_guard lock(block->mutex);
    block->barriers[p].expected = arrivals;
}
FB_DEVICE void barrier_arrive(u32 p) {
    std::lock_guard lock(block->mutex);
    Mbarrier& b = barrier_at(p);
    if (++b.arrivals > b.expected) fail("too many arrivals at mbarrier", p);
    end_phase_if_complete(b);
}
FB_DEVICE void barrier_arrive(u32 p, bool who) {
    if (who) barrier_arrive(p);
}
FB_DEVICE void barrier_expect(u32 p, u32 bytes) {
    std::lock_guard lock(block->mutex);
    Mbarrier& b = barrier_at(p);
    if (++b.arrivals > b.expected) fail("too many arrivals at mbarrier", p);
    b.bytes += bytes;
    end_phase_if_complete(b);
}
FB_DEVICE void barrier_wait(u32 p, u32 parity) {
    std::unique_lock lock(block->mutex);
    Mbarrier& b = barrier_at(p);
    if (!block->changed.wait_for(lock, std::chrono::seconds(60), [&] { return b.phase != parity; }))
        fail("waits for ever at mbarrier", p);
}

// ---- shared memory, and copies into it ----------------------------------------------------------------------------

FB_DEVICE u32 shared_load(u32 p) {
    u32 v;
    memcpy(&v, bytes_at(p, 4), 4);
    return v;
}
FB_DEVICE u32x2 shared_load2(u32 p) {
    u32x2 v;
    memcpy(&v, bytes_at(p, 8), 8);
    return v;
}
#define SHARED_BASE 1024
template <int offset>
FB_DEVICE u32x2 shared_load2_at(u32 p) {
    return shared_load2(p + offset);
}
template <int offset>
FB_DEVICE u32 shared_load_at(u32 p) {
    return shared_load(p + offset);
}
FB_DEVICE u32x4 shared_load4(u32 p) {
    u32x4 v;
    memcpy(&v, bytes_at(p, 16), 16);
    return v;
}
FB_DEVICE void shared_store(u32 p, u32 v) { memcpy(bytes_at(p, 4), &v, 4); }
FB_DEVICE void shared_store4(u32 p, u32x4 v) { memcpy(bytes_at(p, 16), &v, 16); }
FB_DEVICE u32 cluster_address(u32 p, u32 rank) { return rank << WINDOW | (p & ((1u << WINDOW) - 1)); }
FB_DEVICE void cluster_send4(u32 p, u32x4 v, u32 barrier) {
    if (barrier >> WINDOW != p >> WINDOW) fail("mbarrier of another block than the bytes'", barrier);
    Block& owner = *cluster->blocks.at(p >> WINDOW);
    std::lock_guard lock(owner.mutex);
    shared_store4(p, v);
    auto found = owner.barriers.find(barrier);
    if (found == owner.barriers.end()) fail("no mbarrier was made at", barrier);
    found->second.bytes -= 16;
    end_phase_if_complete(found->second, owner);
}

// What fourbit_cuda.tensor_map describes, as plain numbers.
struct TensorMap {
    const u8* address;
    u64 itemsize, columns, rows, tile_columns, tile_rows;
};
FB_DEVICE void prefetch_map(const TensorMap&) {}
FB_DEVICE void copy_tile(u32 to, const TensorMap& map, u32 column, u32 row, u32 barrier) {
    const u32 width = (u32)(map.tile_columns * map.itemsize), mask = width / 16 - 1;
    for (u32 r = 0; r < map.tile_rows; ++r)
        for (u32 at = 0; at < width; ++at) {
            const u64 x = column + at / map.itemsize, y = (u64)row + r;
            const u8 v = x < map.columns && y < map.rows ? map.address[(y * map.columns + x) * map.itemsize + at % map.itemsize] : 0;
            // 16-byte pieces are exchanged by bits of the 128-byte row that they lie in
            const u32 byte = r * width + at, swapped = byte ^ ((byte >> 7 & (mask == 7 ? 7 : 0)) << 4) ^ ((mask == 3 ? byte >> 7 & 3 : 0) << 4);
            *bytes_at(to + swapped, 1) = v;
        }
    std::lock_guard lock(block->mutex);
    Mbarrier& b = barrier_at(barrier);
    b.bytes -= width * (long long)map.tile_rows;
    end_phase_if_complete(b);
}

// ---- numbers ------------------------------------------------------------------------------------------------------

template <class To, class From>
FB_DEVICE To bits_as(From v) {
    To to;
    static_assert(sizeof to == sizeof v);
    memcpy(&to, &v, sizeof v);
    return to;
}
FB_DEVICE u32 bits_of(float v) { return bits_as<u32>(v); }
FB_DEVICE float float_of(u32 v) { return bits_as<float>(v); }
FB_DEVICE float mul_rn(float a, float b) { return a * b; }
FB_DEVICE float add_rn(float a, float b) { return a + b; }
FB_DEVICE float bf16_to_float(u32 v) { return float_of(v << 16); }
FB_DEVICE u32 float_to_bf16(float v) {
    const u32 b = bits_of(v);
    return std::isnan(v) ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
}
FB_DEVICE float f16_to_float(u32 v) {
    const int exponent = v >> 10 & 31, mantissa = v & 1023;
    const float size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                       : exponent == 0 ? std::ldexp((float)mantissa, -24)
                                       : std::ldexp((float)(mantissa | 1024), exponent - 25);
    return v >> 15 & 1 ? -size : size;
}
FB_DEVICE u32 float_to_f16(float v) {
    const u32 sign = bits_of(v) >> 16 & 0x8000;
    const float size = std::fabs(v);
    if (std::isnan(v)) return 0x7fff;
    if (size >= 65520.0f) return sign | 0x7c00;
    int exponent;
    std::frexp(size, &exponent);
    exponent = size == 0.0f || exponent < -13 ? -13 : exponent;  // a mantissa of 11 bits, or what is left of it
    const u32 scaled = (u32)std::nearbyint(std::ldexp(size, 11 - exponent));  // to nearest even
    return sign | (scaled < 1024 ? scaled : (u32)(exponent + 14) * 1024 + (scaled - 1024));
}
FB_DEVICE u32 floats_to_bf16x2(float low, float high) { return float_to_bf16(low) | float_to_bf16(high) << 16; }
FB_DEVICE u32 floats_to_f16x2(float low, float high) { return float_to_f16(low) | float_to_f16(high) << 16; }
FB_DEVICE u32 multiply_add2(u32 a, u32 b, u32 c) {
    u32 v = 0;
    for (int i = 0; i < 32; i += 16)  // a product of two bfloat16 is a float, and the sum of two is rounded from a double
        v |= float_to_bf16((float)((double)(bf16_to_float(a >> i & 0xffff) * bf16_to_float(b >> i & 0xffff)) +
                                   bf16_to_float(c >> i & 0xffff)))
             << i;
    return v;
}
FB_DEVICE u32 multiply2(u32 a, u32 b) { return multiply_add2(a, b, 0x80008000u); }
FB_DEVICE void settle(float&) {}
FB_DEVICE void settle(u32&) {}
FB_DEVICE u32 permute(u32 low, u32 high, u32 selector) {
    const u64 both = (u64)high << 32 | low;
    u32 v = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 s = selector >> 4 * i & 15, byte = both >> 8 * (s & 7) & 255;
        v |= (s & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
    }
    return v;
}

// ---- products -----------------------------------------------------------------------------------------------------

// What wgmma finds: element (row, k) of an operand whose rows lie side by side (k the other way where `transposed`), by
// its descriptor with 16-byte pieces exchanged in 128-byte rows.
FB_DEVICE u64 operand_rows(u32 at) { return 1ull << 62 | 64ull << 32 | 64ull << 16 | (u64)(at >> WINDOW) << 50 | (at >> 4 & 0x3fffu); }
FB_DEVICE float element(u64 operand, u32 row, u32 k, bool transposed) {
    const u32 start = (u32)(operand & 0x3fff) << 4, group = (u32)(operand >> 32 & 0x3fff) << 4;
    const u32 line = transposed ? k : row, place = transposed ? row : k;
    const u32 linear = start + line / 8 * group + line % 8 * 128 + place * 2;
    const u32 p = (u32)(operand >> 50 & 255) << WINDOW | (linear ^ (linear >> 7 & 7) << 4);
    u16 v;
    memcpy(&v, bytes_at(p, 2), 2);
    return DTYPE == FB_BF16 ? bf16_to_float(v) : f16_to_float(v);
}
// d += rows times x transposed, of this lane's elements; `rows`: the 16 elements of both of its rows.
FB_DEVICE void multiply(float (&d)[COLUMNS / 8][4], const float (&rows)[2][16], u64 x, u32 more) {
    const u32 lane = threadIdx.x % 32;
    for (u32 n = 0; n < COLUMNS / 8; ++n)
        for (u32 c = 0; c < 2; ++c) {
            float column[16];
            for (u32 k = 0; k < 16; ++k) column[k] = element(x, 8 * n + lane % 4 * 2 + c, k, false);
            for (u32 i = 0; i < 2; ++i) {
                float sum = more ? d[n][2 * i + c] : 0.0f;
                for (u32 k = 0; k < 16; ++k) sum += rows[i][k] * column[k];
                d[n][2 * i + c] = sum;
            }
        }
}

// Products that a thread has started: not committed yet, and committed in groups.
inline thread_local std::vector<std::function<void()>> started;
inline thread_local std::deque<std::vector<std::function<void()>>> groups;
inline thread_local bool fenced = false;  // since operands in registers, or sums, were written

FB_DEVICE void start(std::function<void()> product) {
    if (!fenced) fail("a product without a fence", 0);
    started.push_back(product);
}
FB_DEVICE void start_product(float (&d)[COLUMNS / 8][4], const u32 (&a)[4], u64 x, u32 more) {
    start([&d, &a, x, more] {
        const u32 lane = threadIdx.x % 32;
        for (u32 i = 0; i < 4; ++i) warp->values[lane][i] = a[i];
        __syncwarp();
        float rows[2][16];
        for (u32 k = 0; k < 16; ++k)
            for (u32 i = 0; i < 2; ++i) {
                const u32 pair = warp->values[lane / 4 * 4 + k % 8 / 2][k / 8 * 2 + i], v = pair >> 16 * (k % 2) & 0xffff;
                rows[i][k] = DTYPE == FB_BF16 ? bf16_to_float(v) : f16_to_float(v);
            }
        __syncwarp();
        multiply(d, rows, x, more);
    });
}
FB_DEVICE void start_product(float (&d)[COLUMNS / 8][4], u64 a, u64 x, u32 more) {
    start([&d, a, x, more] {
        const u32 first = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
        float rows[2][16];
        for (u32 i = 0; i < 2; ++i)
            for (u32 k = 0; k < 16; ++k) rows[i][k] = element(a, first + 8 * i, k, true);
        multiply(d, rows, x, more);
    });
}
FB_DEVICE void products_fence() { fenced = true; }
FB_DEVICE void products_commit() {
    groups.push_back(std::move(started));
    started.clear();
    fenced = false;
}
template <int pending>
FB_DEVICE void products_wait() {
    __syncwarp();  // a warp's products are one instruction
    for (; groups.size() > pending; groups.pop_front())
        for (auto& product : groups.front()) product();
    __syncwarp();
}

FB_DEVICE void store_transposed(u32 to, u32 a, u32 b, u32 c, u32 d) {
    const u32 lane = threadIdx.x % 32, values[4] = {a, b, c, d};
    warp->addresses[lane] = to;
    __syncwarp();
    for (u32 i = 0; i < 4; ++i)
        for (u32 h = 0; h < 2; ++h) {  // row lane / 4 of matrix i, columns 2 (lane % 4) + h
            const u16 v = (u16)(values[i] >> 16 * h);
            memcpy(bytes_at(warp->addresses[8 * i + lane % 4 * 2 + h] + lane / 4 * 2, 2), &v, 2);
        }
    __syncwarp();
}
