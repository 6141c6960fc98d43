#pragma once

#include <cstdint>

#include "xaifast/philox.h"

namespace xaifast {

// Streams never share a counter: the domain sits in the top byte of the last counter word.
enum class Domain : uint32_t { kRounding = 1, kRanks = 2, kSubsets = 3, kChains = 4 };

// Random 64-bit words, a function of (seed, block, domain, tag, attempt) alone.
class Stream {
 public:
  Stream(uint64_t seed, uint64_t block, Domain domain, uint32_t tag = 0, uint32_t attempt = 0)
      : key_{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
        counter_{{attempt << 16, tag, static_cast<uint32_t>(block),
                  static_cast<uint32_t>(block >> 32) ^ (static_cast<uint32_t>(domain) << 24)}} {}

  // One Philox call gives two words.
  uint64_t word() {
    if (next_ == 0) {
      lanes_ = philox4x32(counter_, key_[0], key_[1]);
      ++counter_.lane[0];
    }
    const uint64_t low = lanes_.lane[2 * next_], high = lanes_.lane[2 * next_ + 1];
    next_ ^= 1;
    return low | high << 32;
  }

  // Uniform in [0, n), n <= 2^31; the bias is below 2^-33.
  uint64_t below(uint64_t n) { return static_cast<uint64_t>((static_cast<unsigned __int128>(word()) * n) >> 64); }

  // A uniform multiple of 2^-53 in [0, 1).
  double unit() { return static_cast<double>(word() >> 11) * 0x1p-53; }

 private:
  uint32_t key_[2];
  Philox4 counter_;
  Philox4 lanes_{};
  int next_ = 0;
};

}  // namespace xaifast
