// The floating-point environment that kernels compute in, whatever their thread is set to.
#pragma once

#include <cstdint>

namespace fourbit {

// For its lifetime the calling thread rounds to nearest, keeps subnormal numbers and traps nothing. The setting is
// each thread's own: torch.set_flush_denormal reaches the caller and none of torch's threads, so that without this a
// result would depend on which thread came for a task. Costs a few cycles where the thread has the defaults already.
//
// The clobbered memory keeps the compiler from moving loads and stores, and with them arithmetic, across the change.
class FloatEnvironment {
 public:
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

#if defined(__x86_64__) || defined(__i386__)
  // MXCSR: flush to zero, rounding, masks of traps, subnormals are zeros; below them flags, which are not settings
  __attribute__((always_inline)) FloatEnvironment() {
    asm volatile("stmxcsr %0" : "=m"(saved_) : : "memory");
    changed_ = (saved_ & 0xffc0) != DEFAULT;
    if (changed_) write(DEFAULT);
  }

 private:
  static constexpr uint32_t DEFAULT = 0x1f80;
  __attribute__((always_inline)) static void write(uint32_t value) {
    asm volatile("ldmxcsr %0" : : "m"(value) : "memory");
  }
  uint32_t saved_;
#elif defined(__aarch64__)
  // FPCR: everything that can be set, flushing and rounding among it, is a bit that is zero by default
  __attribute__((always_inline)) FloatEnvironment() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_) : : "memory");
    changed_ = saved_ != DEFAULT;
    if (changed_) write(DEFAULT);
  }

 private:
  static constexpr uint64_t DEFAULT = 0;
  __attribute__((always_inline)) static void write(uint64_t value) {
    asm volatile("msr fpcr, %0" : : "r"(value) : "memory");
  }
  uint64_t saved_;
#else
  FloatEnvironment() : changed_(false), saved_(0) {}

 private:
  static void write(uint32_t) {}
  uint32_t saved_;
#endif
  bool changed_;

 public:
  __attribute__((always_inline)) ~FloatEnvironment() {
    if (changed_) write(saved_);
  }
};

}  // namespace fourbit
