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

// torch gives each thread a share of the range; which share is of no interest, each comes for tasks.
void claim(int64_t, int64_t, void* context) {
  Job& job = *static_cast<Job*>(context);
  for (;;) {
    const int64_t task = job.next.fetch_add(1, std::memory_order_relaxed);
    if (task >= job.tasks) return;
    job.body(task, job.context);
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
