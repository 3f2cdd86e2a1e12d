// Threads without torch: a ParallelFor (parallel.h) on std::thread.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

inline int thread_count = 1;

inline int32_t parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                            void* context) {
  const int64_t pieces = (end - begin + grain - 1) / grain;
  const int64_t threads = pieces < thread_count ? pieces : thread_count;
  const auto edge = [&](int64_t i) { return begin + (end - begin) * i / threads; };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back(body, edge(i), edge(i + 1), context);
  if (threads > 0) body(edge(0), edge(1), context);
  for (std::thread& thread : others) thread.join();
  return 0;
}
