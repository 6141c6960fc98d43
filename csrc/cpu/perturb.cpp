#include "xaifast/perturb.h"

#include <cstring>

#include "bytes.h"

// A perturbed row is a selection of bytes between x and a baseline row, so the kernel knows no dtype. Entries of an
// item's size are selected as vectors, a block of ranks for all repetitions; each other entry is copied from where its
// rank says.
namespace xaifast::XAIFAST_ISA {
namespace {

constexpr int64_t kLongBytes = 2048;     // entries at least this long are left to the C library
constexpr int64_t kBlockEntries = 2048;  // whose ranks stay in the first-level cache over the repetitions
constexpr int64_t kParallelBytes = int64_t{1} << 19;
constexpr uint32_t kSign = uint32_t{1} << 31;

// The rows of one unit: entries with rank + bias <= limit come from `near`, others from `far`. Adding 2^31 makes
// unsigned numbers that are in order, so that ranks below 0 are the lowest; without, ranks below 0 are the highest.
struct Selection {
  uint8_t* out;
  const uint8_t* near;
  const uint8_t* far;
  const int32_t* rank;  // [P]
  uint32_t bias, limit;

  Selection(const PerturbRows& a, int64_t u) {
    const int64_t b = u / a.n_points, row = a.rep * a.period * a.entry_bytes;
    const int64_t* point = a.points + 2 * (u % a.n_points);
    const int64_t count = point[0] < 0 ? 0 : point[0] > kSign ? kSign : point[0];
    out = a.out + (u - a.start) * row;
    near = a.x + b * row;
    far = a.insertion + (a.insertion_per_input ? b * row : 0);
    rank = a.rank + (a.rank_per_input ? b * a.period : 0);
    bias = kSign;
    limit = kSign + static_cast<uint32_t>(count) - 1;
    if (point[1] == 0) return;
    far = near;
    if (count == 0) return;
    near = a.deletion + (a.deletion_per_input ? b * row : 0);
    bias = 0;
    limit = static_cast<uint32_t>(count) - 1;
  }

  bool is_near(int64_t p) const { return static_cast<uint32_t>(rank[p]) + bias <= limit; }
};

template <typename T>
void select_items(const PerturbRows& a, const Selection s) {
  typedef T Item __attribute__((aligned(1), may_alias));
  for (int64_t p = 0; p < a.period; p += kBlockEntries) {
    const int64_t n = p + kBlockEntries < a.period ? kBlockEntries : a.period - p;
    for (int64_t r = 0; r < a.rep; ++r) {
      const int64_t at = (r * a.period + p) * static_cast<int64_t>(sizeof(T));
      Item* __restrict__ out = reinterpret_cast<Item*>(s.out + at);
      const Item* near = reinterpret_cast<const Item*>(s.near + at);
      const Item* far = reinterpret_cast<const Item*>(s.far + at);
      for (int64_t i = 0; i < n; ++i) {
        const Item here = near[i], there = far[i];  // both are read, so that the loop has no branch
        out[i] = s.is_near(p + i) ? here : there;
      }
    }
  }
}

void copy_entries(const PerturbRows& a, const Selection s) {
  const auto near = reinterpret_cast<uintptr_t>(s.near), far = reinterpret_cast<uintptr_t>(s.far);
  for (int64_t r = 0, at = 0; r < a.rep; ++r) {
    for (int64_t p = 0; p < a.period; ++p, at += a.entry_bytes) {
      const uintptr_t state = -static_cast<uintptr_t>(s.is_near(p));  // a branch would be mispredicted
      const auto from = reinterpret_cast<const uint8_t*>(far ^ ((near ^ far) & state));
      if (a.entry_bytes >= kLongBytes) {
        std::memcpy(s.out + at, from + at, a.entry_bytes);
      } else {
        copy_bytes(s.out + at, from + at, a.entry_bytes);
      }
    }
  }
}

}  // namespace

void perturb_rows(const PerturbRows& a) {
  const auto write = a.entry_bytes == 1   ? select_items<uint8_t>
                     : a.entry_bytes == 2 ? select_items<uint16_t>
                     : a.entry_bytes == 4 ? select_items<uint32_t>
                     : a.entry_bytes == 8 ? select_items<uint64_t>
                                          : copy_entries;
  const bool parallel = (a.stop - a.start) * a.rep * a.period * a.entry_bytes >= kParallelBytes;
#pragma omp parallel for schedule(static) num_threads(a.n_threads) if (parallel)
  for (int64_t u = a.start; u < a.stop; ++u) write(a, Selection(a, u));
}

}  // namespace xaifast::XAIFAST_ISA
