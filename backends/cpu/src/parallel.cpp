#include "parallel.h"

#include <atomic>

namespace fourbit {
namespace {

ParallelFor torch_parallel_for = nullptr;

struct Job {
  void (*body)(int64_t, void*);
  void* context;
  int64_t tasks;
  std::atomic<int64_t> next{0};
};

// torch gives each thread a share of the range; which share is of no interest, each comes for tasks. It takes
// neighbouring ones, a sixteenth of what is left: what a thread prefetches at the end of one is then the start of
// its own next, and towards the end the pieces are small enough to come out even.
void claim(int64_t, int64_t, void* context) {
  Job& job = *static_cast<Job*>(context);
  int64_t begin = job.next.load(std::memory_order_relaxed);
  while (begin < job.tasks) {
    const int64_t share = (job.tasks - begin) / 16;
    const int64_t end = begin + (share > 1 ? share : 1);
    if (!job.next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
    for (int64_t task = begin; task < end; ++task) job.body(task, job.context);
    begin = job.next.load(std::memory_order_relaxed);
  }
}

}  // namespace

void set_parallel_for(ParallelFor function) { torch_parallel_for = function; }

void run_tasks(int64_t tasks, void (*body)(int64_t, void*), void* context) {
  Job job{body, context, tasks};
  // An error of torch's (a thread that cannot be started) leaves tasks unclaimed: the caller does the rest.
  if (torch_parallel_for != nullptr) torch_parallel_for(0, tasks, 1, claim, &job);
  claim(0, 0, &job);
}

}  // namespace fourbit
