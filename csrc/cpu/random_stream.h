#pragma once

#include <algorithm>
#include <cstdint>

#include "xaifast/kernels.h"

namespace xaifast {

// Streams never share a counter: the domain sits in the top byte of the last counter word.
enum class Domain : uint32_t { kRounding = 1, kRanks = 2, kSubsets = 3, kChains = 4 };

struct Words {
  const uint64_t* data;
  int64_t count;
};

// Random 64-bit words, a function of (seed, block, domain, tag, attempt) alone.
class Stream {
 public:
  Stream(const Kernels& kernels, uint64_t seed, uint64_t block, Domain domain, uint32_t tag = 0, uint32_t attempt = 0)
      : philox_words_(kernels.philox_words),
        key_{{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}},
        counter_{{attempt << 16, tag, static_cast<uint32_t>(block),
                  static_cast<uint32_t>(block >> 32) ^ (static_cast<uint32_t>(domain) << 24)}} {}

  // The next words: `wanted` of them, or fewer, at least one; valid until the next call.
  Words take(int64_t wanted) {
    if (next_ == filled_) {
      const int64_t calls = std::min((wanted + 1) / 2, kCalls);
      const int64_t made = (calls + kPhiloxBlock - 1) / kPhiloxBlock * kPhiloxBlock;
      philox_words_(words_, made, counter_, key_);
      counter_.lane[0] += static_cast<uint32_t>(made);
      next_ = 0;
      filled_ = 2 * made;
    }
    const Words words{words_ + next_, std::min(wanted, filled_ - next_)};
    next_ += words.count;
    return words;
  }

  // A uniform multiple of 2^-53 in [0, 1).
  double unit() { return static_cast<double>(*take(1).data >> 11) * 0x1p-53; }

 private:
  static constexpr int64_t kCalls = 16 * kPhiloxBlock;

  void (*philox_words_)(uint64_t*, int64_t, Philox4, PhiloxKey);
  PhiloxKey key_;
  Philox4 counter_;
  int64_t next_ = 0, filled_ = 0;
  uint64_t words_[2 * kCalls];
};

// Uniform in [0, n), n <= 2^31, from a random word; the bias is below 2^-33.
inline int64_t below(uint64_t word, int64_t n) {
  return static_cast<int64_t>((static_cast<unsigned __int128>(word) * static_cast<uint64_t>(n)) >> 64);
}

}  // namespace xaifast
