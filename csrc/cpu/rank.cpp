#include "xaifast/rank.h"

#include <algorithm>
#include <cstdlib>
#include <type_traits>
#include <utility>

// A value becomes an unsigned key that sorts as it should, its index is put below it, and the numbers are sorted: few
// by comparison, many by a radix sort from the lowest digit of the key up, which is stable and so keeps indices
// ascending.
namespace xaifast {
namespace {

constexpr int64_t kFewPerByte = 12;  // of key: clearing and adding up the counts of a digit cost as much as comparisons
constexpr int64_t kManyFeatures = 1024;  // from which fewer passes with more buckets are faster
constexpr int kIndexBits = 32;

// Descending order of values as ascending order of keys; for reversed ties ascending order, to be read from its end.
template <typename Key>
Key key_of(Key bits, const RankFeatures& a) {
  constexpr Key kSign = Key{1} << (8 * sizeof(Key) - 1), kAll = ~Key{0};
  const bool ascending = a.ties == TieOrder::kReversedIndex;
  Key key = bits ^ kSign;
  if (a.infinity != 0) {
    const Key size = bits & (kSign - 1);
    if (size > a.infinity) return ascending || a.ties == TieOrder::kIndex ? kAll : Key{0};
    key = size == 0 ? kSign : bits & kSign ? ~bits : key;  // -0.0 is 0.0
  }
  return ascending ? key : ~key;
}

template <int kDigitBits, typename Packed>
Packed* radix_sort(Packed* items, Packed* other, int64_t n, int key_bits) {
  constexpr int kBuckets = 1 << kDigitBits;
  uint32_t counts[kBuckets];
  for (int shift = kIndexBits; shift < kIndexBits + key_bits; shift += kDigitBits) {
    const auto digit = [shift](Packed item) { return static_cast<uint32_t>(item >> shift) & (kBuckets - 1); };
    std::fill(counts, counts + kBuckets, 0);
    for (int64_t i = 0; i < n; ++i) ++counts[digit(items[i])];
    if (counts[digit(items[0])] == n) continue;
    uint32_t sum = 0;
    for (uint32_t& count : counts) sum += std::exchange(count, sum);
    for (int64_t i = 0; i < n; ++i) other[counts[digit(items[i])]++] = items[i];
    std::swap(items, other);
  }
  return items;
}

template <typename Key>
Status rank_as(const RankFeatures& a) {
  using Packed = std::conditional_t<sizeof(Key) == 8, unsigned __int128, uint64_t>;
  const int64_t n = a.n_features;
  const int n_threads = static_cast<int>(std::min<int64_t>(a.n_threads, a.n_inputs));
  Status status = Status::kOk;
#pragma omp parallel num_threads(n_threads) if (n_threads > 1 && a.n_inputs * n >= 4096)
  {
    auto* const items = static_cast<Packed*>(std::malloc(2 * n * sizeof(Packed)));
#pragma omp for schedule(static)
    for (int64_t b = 0; b < a.n_inputs; ++b) {
      if (items == nullptr) {
#pragma omp atomic write
        status = Status::kNoMemory;
        continue;
      }
      const Key* values = static_cast<const Key*>(a.values) + b * n;
      for (int64_t i = 0; i < n; ++i) items[i] = static_cast<Packed>(key_of(values[i], a)) << kIndexBits | i;
      Packed* sorted = items;
      if (n <= kFewPerByte * static_cast<int64_t>(sizeof(Key))) {
        std::sort(items, items + n);
      } else {
        const auto sort = n < kManyFeatures ? radix_sort<8, Packed> : radix_sort<11, Packed>;
        sorted = sort(items, items + n, n, 8 * sizeof(Key));
      }
      int32_t* rank = a.rank + b * n;
      const bool reversed = a.least != (a.ties == TieOrder::kReversedIndex);
      for (int64_t place = 0; place < n; ++place) {
        rank[static_cast<uint32_t>(sorted[place])] = static_cast<int32_t>(reversed ? n - 1 - place : place);
      }
    }
    std::free(items);
  }
  return status;
}

}  // namespace

Status rank_features(const RankFeatures& a) {
  if (a.itemsize == 2) return rank_as<uint16_t>(a);
  return a.itemsize == 4 ? rank_as<uint32_t>(a) : rank_as<uint64_t>(a);
}

}  // namespace xaifast
