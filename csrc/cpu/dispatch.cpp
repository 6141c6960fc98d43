#include <cstring>

#include "xaifast/kernels.h"

namespace xaifast {

int compiled_kernels(Kernels (&table)[kMaxIsas]) {
  int count = 0;
  table[count++] = {"baseline", baseline::select_rows, baseline::compact_rows, baseline::cubic_regression};
#if defined(XAIFAST_HAVE_V3)
  table[count++] = {"v3", v3::select_rows, v3::compact_rows, v3::cubic_regression};
#endif
#if defined(XAIFAST_HAVE_V4)
  table[count++] = {"v4", v4::select_rows, v4::compact_rows, v4::cubic_regression};
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
