// Work shared among torch's own threads.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fourbit {

// `torch_parallel_for` of libtorch_cpu (a stable C symbol since torch 2.10), by address: no link to torch, and
// never a second thread pool beside torch's. Null: everything runs on the calling thread.
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                                void* context);
void set_parallel_for(ParallelFor function);

// Calls body(task, context) once for each task, on up to as many threads as torch uses. Threads claim tasks one
// after another: one that the system has put aside delays only what it had claimed, not a fixed share.
//
// A body returns 0, or how many bytes of memory it could not have; no task begins after that. Returns 0, or those.
// (An exception could not pass: neither torch's C function nor its threads would carry one.)
int64_t run_tasks(int64_t tasks, int64_t (*body)(int64_t task, void* context), void* context);

// `run_tasks` with a callable, which returns nothing where it needs no memory. `serial` keeps small work on the
// calling thread.
template <typename Body>
int64_t parallel(int64_t tasks, bool serial, Body& body) {
  const auto one = [](int64_t task, void* context) -> int64_t {
    Body& of = *static_cast<Body*>(context);
    if constexpr (std::is_void_v<decltype(of(task))>) {
      of(task);
      return 0;
    } else {
      return of(task);
    }
  };
  if (!serial && tasks > 1) return run_tasks(tasks, one, &body);
  for (int64_t task = 0; task < tasks; ++task) {
    if (const int64_t missing = one(task, &body); missing != 0) return missing;
  }
  return 0;
}

}  // namespace fourbit
