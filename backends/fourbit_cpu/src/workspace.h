// Scratch memory of a thread, kept between calls.
#pragma once

#include <cstdint>

namespace fourbit {

// PANELS: what one call shares among its threads, owned by the calling thread. TASK: what one task works in.
enum Slot { PANELS = 0, TASK = 1 };

// At least `bytes` of memory at a multiple of 64, the calling thread's until its next request for that slot. Null
// where the system has none: the slot is then empty, and the next request starts afresh.
void* workspace(Slot slot, int64_t bytes);

// Gives a slot of the calling thread back if it is larger than is worth keeping.
void trim_workspace(Slot slot);

}  // namespace fourbit
