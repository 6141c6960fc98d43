#include <cstdlib>
#include <cstring>

#include "bytes.h"
#include "lane_mask.h"
#include "xaifast/rows.h"

// A masked row is a selection of bytes between x and a baseline row, so the kernel knows no dtype. Three ways to make
// it:
// - runs: neighbouring entries of one player are copied together, and neighbouring runs of one state are merged;
// - entries: where runs are short but an entry is a vector, each entry is copied from where its state says;
// - lanes: where runs are short, the coalition is expanded once into a byte mask of the entries, and the rows of all
//   repetitions and background rows are blended with it.
// Units are made one after the other, which keeps the writing sequential: measured faster than going block by block
// through all units, although x and the baseline then come from the nearer caches.
namespace xaifast::XAIFAST_ISA {
namespace {

constexpr int64_t kRunBytes = 32;        // runs at least this long on average are copied
constexpr int64_t kEntryRunBytes = 256;  // the same where entries are vectors
constexpr int64_t kLongBytes = 2048;     // pieces at least this long are left to the C library
constexpr int64_t kBlockRuns = 1024;     // whose pieces are found before the repetitions copy them
constexpr int64_t kBlockBytes = 4096;    // of mask: stays in the first-level cache while rows are blended with it
constexpr int64_t kPatternBytes = 1024;  // rows shorter than half of this are blended several at a time
constexpr int64_t kParallelBytes = int64_t{1} << 19;

struct Run {
  int64_t begin;  // bytes from the start of a period
  int32_t player;
};

int64_t count_runs(const int32_t* index, int64_t n) {
  int64_t runs = 1;
  for (int64_t p = 1; p < n; ++p) runs += index[p] != index[p - 1];
  return runs;
}

void find_runs(const int32_t* index, int64_t n, int64_t entry_bytes, Run* runs /* [n_runs + 1] */) {
  int64_t count = 0;
  for (int64_t p = 0; p < n; ++p) {
    if (p == 0 || index[p] != index[p - 1]) runs[count++] = {p * entry_bytes, index[p]};
  }
  runs[count] = {n * entry_bytes, -1};
}

// What the units of a range have in common.
struct Plan {
  const SelectRows& a;
  const int32_t* index;  // [P]
  const Run* runs;       // [n_runs + 1]; null: by lanes
  int64_t n_runs;
  Lookup lookup;    // by lanes
  int64_t period;   // bytes
  int64_t repeats;  // periods in a unit's rows: R * rep
};

// The rows of one unit.
struct Unit {
  uint8_t* out;             // [R, rep, period]
  const uint8_t* x;         // [rep, period]
  const uint8_t* baseline;  // [R, rep, period]
  const int64_t* bits;      // [W]

  Unit(const Plan& plan, int64_t u) {
    const SelectRows& a = plan.a;
    const int64_t b = u / a.n_coalitions, c = u % a.n_coalitions, rows = plan.repeats * plan.period;
    out = a.out + (u - a.start) * rows;
    x = a.x + b * a.rep * plan.period;
    baseline = a.baseline + (a.baseline_per_input ? b * rows : 0);
    bits = a.bits + (a.bits_per_input ? u : c) * a.words;
  }
};

XAIFAST_SHARED void copy_piece(uint8_t* out, const uint8_t* in, int64_t n) {
  if (n >= kLongBytes) {
    std::memcpy(out, in, n);
  } else {
    copy_bytes(out, in, n);
  }
}

void select_by_runs(const Plan& plan, const Unit& unit) {
  int64_t edges[kBlockRuns + 2];  // pieces begin present and alternate
  const int64_t words = plan.a.words;
  for (int64_t first = 0; first < plan.n_runs; first += kBlockRuns) {
    const int64_t last = first + kBlockRuns < plan.n_runs ? first + kBlockRuns : plan.n_runs;
    int64_t count = 0;
    bool state = true;
    for (int64_t i = first; i < last; ++i) {
      const bool present = is_present(unit.bits, words, plan.runs[i].player);
      edges[count] = plan.runs[i].begin;
      count += present != state;  // no branch: it would be mispredicted every other time
      state = present;
    }
    edges[count] = edges[count + 1] = plan.runs[last].begin;
    for (int64_t r = 0; r < plan.repeats; ++r) {
      uint8_t* out = unit.out + r * plan.period;
      const uint8_t* x = unit.x + r % plan.a.rep * plan.period;
      const uint8_t* baseline = unit.baseline + r * plan.period;
      int64_t at = plan.runs[first].begin;
      for (int64_t i = 0; i <= count; i += 2) {
        copy_piece(out + at, x + at, edges[i] - at);
        copy_piece(out + edges[i], baseline + edges[i], edges[i + 1] - edges[i]);
        at = edges[i + 1];
      }
    }
  }
}

template <int64_t kBytes>
void select_by_entries(const Plan& plan, const Unit& unit) {
  const LaneMask lanes(unit.bits, plan.a.words, kBytes, plan.lookup);
  const States& states = lanes.states();
  for (int64_t r = 0; r < plan.repeats; ++r) {
    uint8_t* out = unit.out + r * plan.period;
    const auto x = reinterpret_cast<uintptr_t>(unit.x + r % plan.a.rep * plan.period);
    const auto baseline = reinterpret_cast<uintptr_t>(unit.baseline + r * plan.period);
    for (int64_t p = 0; p < plan.a.period; ++p) {
      const auto state = static_cast<uintptr_t>(states.of(plan.index[p]));  // no branch: it would be mispredicted
      const auto from = reinterpret_cast<const uint8_t*>(baseline ^ ((x ^ baseline) & state));
      __builtin_memcpy(out + p * kBytes, from + p * kBytes, kBytes);
    }
  }
}

void select_by_lanes(const Plan& plan, const Unit& unit) {
  const SelectRows& a = plan.a;
  const LaneMask lanes(unit.bits, a.words, a.entry_bytes, plan.lookup);
  alignas(64) uint8_t mask[kBlockBytes + kMaskExcess];
  const int64_t block = kBlockBytes / a.entry_bytes;
  for (int64_t p = 0; p < a.period; p += block) {
    const int64_t n = p + block < a.period ? block : a.period - p, at = p * a.entry_bytes;
    lanes.expand(mask, plan.index + p, n);
    for (int64_t r = 0; r < plan.repeats; ++r) {
      const int64_t to = r * plan.period + at, from = r % a.rep * plan.period + at;
      blend_bytes(unit.out + to, unit.x + from, unit.baseline + to, mask, n * a.entry_bytes);
    }
  }
}

// Short rows over a background: mask and x are repeated until a blend is long enough to pay.
void select_by_patterns(const Plan& plan, const Unit& unit) {
  const SelectRows& a = plan.a;
  alignas(64) uint8_t mask[kPatternBytes + kMaskExcess];
  alignas(64) uint8_t x[kPatternBytes];
  const int64_t row = a.rep * plan.period;
  const int64_t rows = kPatternBytes / row < a.n_background ? kPatternBytes / row : a.n_background;
  LaneMask(unit.bits, a.words, a.entry_bytes, plan.lookup).expand(mask, plan.index, a.period);
  for (int64_t k = 1; k < rows * a.rep; ++k) copy_bytes(mask + k * plan.period, mask, plan.period);
  for (int64_t k = 0; k < rows; ++k) copy_bytes(x + k * row, unit.x, row);
  for (int64_t r = 0; r < a.n_background; r += rows) {
    const int64_t n = r + rows < a.n_background ? rows : a.n_background - r;
    blend_bytes(unit.out + r * row, x, unit.baseline + r * row, mask, n * row);
  }
}

// Units start..stop, which share one index.
Status select_units(const SelectRows& a, const int32_t* index, int64_t start, int64_t stop) {
  Plan plan = {
      a, index, nullptr, count_runs(index, a.period), Lookup::kBits, a.period * a.entry_bytes, a.n_background * a.rep};
  const bool vectors = a.entry_bytes == 16 || a.entry_bytes == 32 || a.entry_bytes == 64;
  Run* runs = nullptr;
  if (plan.period >= plan.n_runs * (vectors ? kEntryRunBytes : kRunBytes)) {
    plan.runs = runs = static_cast<Run*>(std::malloc((plan.n_runs + 1) * sizeof(Run)));
    if (runs == nullptr) return Status::kNoMemory;
    find_runs(index, a.period, a.entry_bytes, runs);
  } else {
    plan.lookup = choose_lookup(index, a.period, a.words);
    if (vectors && plan.lookup == Lookup::kStretch) {
      plan.lookup = a.words * 64 <= kTablePlayers ? Lookup::kTable : Lookup::kBits;
    }
  }
  const auto select = runs != nullptr                                                  ? select_by_runs
                      : a.entry_bytes == 16                                            ? select_by_entries<16>
                      : a.entry_bytes == 32                                            ? select_by_entries<32>
                      : a.entry_bytes == 64                                            ? select_by_entries<64>
                      : a.n_background > 1 && a.rep * plan.period <= kPatternBytes / 2 ? select_by_patterns
                                                                                       : select_by_lanes;
  const bool parallel = (stop - start) * plan.repeats * plan.period >= kParallelBytes;
#pragma omp parallel for schedule(static) num_threads(a.n_threads) if (parallel)
  for (int64_t u = start; u < stop; ++u) select(plan, Unit(plan, u));
  std::free(runs);
  return Status::kOk;
}

}  // namespace

Status select_rows(const SelectRows& a) {
  if (!a.index_per_input) return select_units(a, a.index, a.start, a.stop);
  for (int64_t start = a.start; start < a.stop;) {
    const int64_t b = start / a.n_coalitions, end = (b + 1) * a.n_coalitions;
    const int64_t stop = end < a.stop ? end : a.stop;
    const Status status = select_units(a, a.index + b * a.period, start, stop);
    if (status != Status::kOk) return status;
    start = stop;
  }
  return Status::kOk;
}

}  // namespace xaifast::XAIFAST_ISA
