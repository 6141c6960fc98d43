#include <cstring>

#include "xaifast/kernels.h"

namespace xaifast {

#define XAIFAST_KERNELS(isa)                                                                             \
  Kernels {                                                                                              \
    #isa, isa::select_rows, isa::compact_rows, isa::cubic_regression, isa::philox_words, isa::pack_bits, \
        isa::unpack_bits, isa::perturb_rows, isa::occlude_step, isa::occlude_certify                     \
  }

int compiled_kernels(Kernels (&table)[kMaxIsas]) {
  int count = 0;
  table[count++] = XAIFAST_KERNELS(baseline);
#if defined(XAIFAST_HAVE_V3)
  table[count++] = XAIFAST_KERNELS(v3);
#endif
#if defined(XAIFAST_HAVE_V4)
  table[count++] = XAIFAST_KERNELS(v4);
#endif
  return count;
}

bool cpu_has(const char* isa) {
  if (std::strcmp(isa, "baseline") == 0) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  if (std::strcmp(isa, "v3") == 0) return v3;
  if (std::strcmp(isa, "v4") == 0) {
    return v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
#endif
  return false;
}

}  // namespace xaifast
