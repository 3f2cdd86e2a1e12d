// Which of the compiled instruction sets this processor has.
#include "kernels.h"

namespace fourbit {
namespace {

struct List {
  const Kernels* items[6] = {};
  int count = 0;
  void add(const Kernels& kernels, bool usable) {
    if (usable) items[count++] = &kernels;
  }
};

List detect() {
  List list;
#if defined(FOURBIT_X86)
  // libgcc's and compiler-rt's __builtin_cpu_supports also ask XGETBV whether the system saves the registers
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  list.add(kernels_avx512_bf16, avx512 && __builtin_cpu_supports("avx512bf16"));
  list.add(kernels_avx512, avx512);
  list.add(kernels_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
#elif defined(FOURBIT_ARM64)
  list.add(kernels_neon, true);  // every 64-bit ARM has it
#endif
  list.add(kernels_scalar, true);
  return list;
}

}  // namespace

const Kernels* const* available_kernels() {
  static const List list = detect();
  return list.items;
}

}  // namespace fourbit
