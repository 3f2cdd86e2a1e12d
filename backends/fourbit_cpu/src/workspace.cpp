#include "workspace.h"

#include <cstdlib>

#include "huge_pages.h"

namespace fourbit {
namespace {

constexpr int64_t KEPT = int64_t{64} << 20;

struct Buffer {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Buffer() { std::free(data); }
};

thread_local Buffer buffers[2];

}  // namespace

void* workspace(Slot slot, int64_t bytes) {
  Buffer& buffer = buffers[slot];
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    // large ones whole in 2 MB pages: they are read again and again
    const int64_t unit = bytes >= int64_t{1} << 20 ? int64_t{2} << 20 : 64;
    const int64_t rounded = (bytes + unit - 1) / unit * unit;
    buffer.data = std::aligned_alloc(static_cast<size_t>(unit), static_cast<size_t>(rounded));
    buffer.bytes = buffer.data == nullptr ? 0 : rounded;
    if (buffer.data != nullptr && unit > 64) advise_huge_pages(buffer.data, rounded);
  }
  return buffer.data;
}

void trim_workspace(Slot slot) {
  Buffer& buffer = buffers[slot];
  if (buffer.bytes <= KEPT) return;
  std::free(buffer.data);
  buffer.data = nullptr;
  buffer.bytes = 0;
}

}  // namespace fourbit
