#pragma once

#include "xaifast/bits.h"

namespace xaifast {

struct Philox4 {
  uint32_t lane[4];
};

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
XAIFAST_SHARED Philox4 philox4x32(Philox4 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = 0xD2511F53ull * counter.lane[0];
    const uint64_t product1 = 0xCD9E8D57ull * counter.lane[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.lane[1] ^ key0, static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.lane[3] ^ key1, static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

}  // namespace xaifast
