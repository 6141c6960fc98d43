#pragma once

#include <cstdint>
#include <vector>

namespace xaifast {

inline uint64_t mix(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
  return hash ^ hash >> 32;
}

// A set of items that the caller numbers, hashes and compares, so that equality is exact; open addressing, at most half
// full.
class Distinct {
 public:
  explicit Distinct(int64_t most_items) {
    size_t size = 2;
    while (size < 2 * static_cast<size_t>(most_items)) size *= 2;
    items_.assign(size, -1);
  }

  // Adds an item; returns false, and adds nothing, if same(other) holds for one that is there.
  template <typename Same>
  bool add(int64_t item, uint64_t hash, Same same) {
    const size_t last = items_.size() - 1;
    size_t slot = hash & last;
    for (; items_[slot] >= 0; slot = (slot + 1) & last) {
      if (same(items_[slot])) return false;
    }
    items_[slot] = item;
    return true;
  }

 private:
  std::vector<int64_t> items_;
};

}  // namespace xaifast
