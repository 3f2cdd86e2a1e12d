#include "parallel.h"

#include <atomic>

#include "float_environment.h"

namespace fourbit {
namespace {

ParallelFor torch_parallel_for = nullptr;

struct Job {
  int64_t (*body)(int64_t, void*);
  void* context;
  int64_t tasks;
  std::atomic<int64_t> next{0}, missing{0};
};

// torch gives each thread a share of the range; which share is of no interest, each comes for tasks. It takes
// neighbouring ones, a sixteenth of what is left: what a thread prefetches at the end of one is then the start of
// its own next, and towards the end the pieces are small enough to come out even.
void claim(int64_t, int64_t, void* context) {
  Job& job = *static_cast<Job*>(context);
  const FloatEnvironment environment;
  int64_t begin = job.next.load(std::memory_order_relaxed);
  while (begin < job.tasks) {
    const int64_t share = (job.tasks - begin) / 16;
    const int64_t end = begin + (share > 1 ? share : 1);
    if (!job.next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
    for (int64_t task = begin; task < end; ++task) {
      if (const int64_t missing = job.body(task, job.context); missing != 0) {
        job.missing.store(missing, std::memory_order_relaxed);
        job.next.store(job.tasks, std::memory_order_relaxed);
        return;
      }
    }
    begin = job.next.load(std::memory_order_relaxed);
  }
}

}  // namespace

void set_parallel_for(ParallelFor function) { torch_parallel_for = function; }

int64_t run_tasks(int64_t tasks, int64_t (*body)(int64_t, void*), void* context) {
  Job job{body, context, tasks};
  // An error of torch's (a thread that cannot be started) leaves tasks unclaimed: the caller does the rest.
  if (torch_parallel_for != nullptr) torch_parallel_for(0, tasks, 1, claim, &job);
  claim(0, 0, &job);
  return job.missing.load(std::memory_order_relaxed);
}

}  // namespace fourbit
