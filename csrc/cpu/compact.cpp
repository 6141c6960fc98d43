#include <cstring>

#include "xaifast/bits.h"
#include "xaifast/rows.h"

namespace xaifast::XAIFAST_ISA {

// Runs of neighbouring present tokens are one copy; what is left of the output row is zeroed.
int64_t compact_rows(const CompactRows& a, int n_threads) {
  int64_t overflows = 0;
  const int64_t units = a.stop - a.start;
  const bool parallel = units * a.length * a.row_bytes >= (int64_t{1} << 22);
#pragma omp parallel for schedule(static) num_threads(n_threads) reduction(+ : overflows) if (parallel)
  for (int64_t i = 0; i < units; ++i) {
    const int64_t u = a.start + i, b = u / a.n_coalitions, c = u % a.n_coalitions;
    const int64_t* bits = a.bits + (a.bits_per_input ? u : c) * a.words;
    const int32_t* index = a.index + (a.index_per_input ? b * a.n_tokens : 0);
    const uint8_t* x = a.x + b * a.n_tokens * a.row_bytes;
    uint8_t* out = a.out + i * a.length * a.row_bytes;
    int64_t filled = 0;
    for (int64_t t = 0; t < a.n_tokens;) {
      const int64_t first = t;
      while (t < a.n_tokens && is_present(bits, a.words, index[t])) ++t;
      const int64_t room = a.length - filled, run = t - first;
      const int64_t taken = run < room ? run : room;
      if (taken > 0) std::memcpy(out + filled * a.row_bytes, x + first * a.row_bytes, taken * a.row_bytes);
      filled += taken;
      if (run > room) {
        ++overflows;
        break;
      }
      if (run == 0) ++t;
    }
    if (filled < a.length) std::memset(out + filled * a.row_bytes, 0, (a.length - filled) * a.row_bytes);
  }
  return overflows;
}

}  // namespace xaifast::XAIFAST_ISA
