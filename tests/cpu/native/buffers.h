// Memory in which a stray access cannot go unseen.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// AT_END: the buffer ends where an inaccessible page begins, so that it has the alignment of its size and no more.
// AT_BEGIN: it begins where one ends. HEAP: malloc of its exact size, for AddressSanitizer's red zones.
enum Placement { AT_END, AT_BEGIN, HEAP };

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (map_ != nullptr) munmap(map_, mapped_);
    if (placement_ == HEAP) std::free(data_);
  }

  // What is to be had beside a buffer is filled with FILL, and so is the buffer itself.
  void allocate(Placement placement, size_t size) {
    placement_ = placement;
    size_ = size;
    if (placement == HEAP) {
      data_ = static_cast<uint8_t*>(std::malloc(size));
      if (data_ == nullptr && size != 0) fail("malloc");
      if (size != 0) std::memset(data_, FILL, size);
      return;
    }
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t inner = (size + page - 1) / page * page;
    mapped_ = inner + 2 * page;
    void* map = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) fail("mmap");
    map_ = static_cast<uint8_t*>(map);
    first_ = map_ + page;
    last_ = first_ + inner;
    if (inner != 0 && mprotect(first_, inner, PROT_READ | PROT_WRITE) != 0) fail("mprotect");
    std::memset(first_, FILL, inner);
    data_ = placement == AT_END ? last_ - size : first_;
  }

  // From here on a write faults.
  void make_read_only() {
    if (placement_ != HEAP && last_ != first_ && mprotect(first_, static_cast<size_t>(last_ - first_), PROT_READ) != 0)
      fail("mprotect");
  }

  // Whether the rest of the first and last page is as it was: stray writes on the side that has no guard.
  bool surroundings_intact() const {
    if (placement_ == HEAP) return true;
    for (const uint8_t* p = first_; p < data_; ++p)
      if (*p != FILL) return false;
    for (const uint8_t* p = data_ + size_; p < last_; ++p)
      if (*p != FILL) return false;
    return true;
  }

  bool surrounds(const uint8_t* address) const { return map_ <= address && address < map_ + mapped_; }
  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  static constexpr uint8_t FILL = 0xa5;  // as a float, and as a scale, a number that would show in a result

  static void fail(const char* what) {
    std::perror(what);
    std::exit(3);
  }

  Placement placement_ = AT_END;
  uint8_t *map_ = nullptr, *first_ = nullptr, *last_ = nullptr, *data_ = nullptr;
  size_t mapped_ = 0, size_ = 0;
};
