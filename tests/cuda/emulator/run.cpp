// KERNEL of SOURCE on a CPU: `run` launches it on emulated blocks, cluster by cluster.
#include SOURCE

#include <functional>
#include <pthread.h>

u8 shared_[1];

namespace {

struct Start {
    std::function<void()> body;
};

void* enter(void* start) {
    ((Start*)start)->body();
    return nullptr;
}

void run_cluster(u32 first, u32 blocks, u32 shared_bytes, const std::function<void()>& kernel) {
    Cluster c;
    c.all.members = SPLIT * THREADS;
    for (u32 rank = 0; rank < SPLIT; ++rank) {
        auto b = std::make_unique<Block>();
        b->memory.assign(1024 + shared_bytes, 0xcd);
        b->all.members = THREADS;
        for (auto& group : b->groups) group.members = 128;
        b->groups[3].members = 256;  // of products_barrier
        for (u32 w = 0; w < THREADS / 32; ++w) {
            b->warps.push_back(std::make_unique<Warp>());
            b->warps.back()->all.members = 32;
        }
        c.blocks.push_back(std::move(b));
    }
    std::vector<Start> starts(SPLIT * THREADS);
    std::vector<pthread_t> threads(SPLIT * THREADS);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 256 << 10);
    for (u32 i = 0; i < SPLIT * THREADS; ++i) {
        starts[i].body = [&, i] {
            cluster = &c, cluster_rank = i / THREADS, block = c.blocks[cluster_rank].get();
            threadIdx.x = i % THREADS, blockIdx.x = first + cluster_rank, gridDim.x = blocks;
            warp = block->warps[threadIdx.x / 32].get();
            kernel();
        };
        if (pthread_create(&threads[i], &attributes, enter, &starts[i])) fail("no thread", i);
    }
    for (pthread_t thread : threads) pthread_join(thread, nullptr);
}

}  // namespace

extern "C" void run(const TensorMap* maps, const void* const* addresses, const i64* sizes, u32 blocks, u32 shared_bytes) {
    for (u32 first = 0; first < blocks; first += SPLIT)
        run_cluster(first, blocks, shared_bytes, [&] {
            KERNEL(maps[0], maps[1], addresses[0], (const float*)addresses[1], (const float*)addresses[2],
                   (const float*)addresses[3], (const float*)addresses[4], addresses[5], (u16*)addresses[6], sizes[0],
                   sizes[1], sizes[2], sizes[3], sizes[4]);
        });
}
