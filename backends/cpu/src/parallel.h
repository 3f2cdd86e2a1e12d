// Work shared among torch's own threads.
#pragma once

#include <cstdint>

namespace fourbit {

// `torch_parallel_for` of libtorch_cpu (a stable C symbol since torch 2.10), by address: no link to torch, and
// never a second thread pool beside torch's. Null: everything runs on the calling thread.
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                                void* context);
void set_parallel_for(ParallelFor function);

// Calls body(task, context) once for each task, on up to as many threads as torch uses. Threads claim tasks one
// after another: one that the system has put aside delays only what it had claimed, not a fixed share.
void run_tasks(int64_t tasks, void (*body)(int64_t task, void* context), void* context);

// `run_tasks` with a callable. `serial` keeps small work on the calling thread.
template <typename Body>
void parallel(int64_t tasks, bool serial, Body& body) {
  if (serial || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  run_tasks(tasks, [](int64_t task, void* context) { (*static_cast<Body*>(context))(task); }, &body);
}

}  // namespace fourbit
