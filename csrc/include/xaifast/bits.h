#pragma once

#include <cstdint>

// Functions shared by host and device. Internal linkage and forced inlining: an external inline function compiled for a
// newer instruction set could be the copy the linker keeps for everybody.
#if defined(__CUDACC__)
#define XAIFAST_SHARED static __host__ __device__ __forceinline__
#else
#define XAIFAST_SHARED [[maybe_unused]] static inline __attribute__((always_inline))
#endif

namespace xaifast {

XAIFAST_SHARED int popcount32(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

// Position of the k-th set bit (k = 0: the lowest), -1 if there is none: a binary search over popcounts of halves.
XAIFAST_SHARED int nth_set_bit(uint32_t word, int k) {
  if (k < 0 || k >= popcount32(word)) return -1;
  int position = 0;
  for (int width = 16; width > 0; width >>= 1) {
    const int below = popcount32((word >> position) & ((1u << width) - 1));
    if (k >= below) {
      k -= below;
      position += width;
    }
  }
  return position;
}

// Whether an element of the player map `player` is present in a coalition. -1 belongs to no player: always present; a
// player beyond the words is absent.
XAIFAST_SHARED bool is_present(const int64_t* bits /* [W] */, int64_t words, int32_t player) {
  if (player < 0) return true;
  const int64_t w = player >> 6;
  return w < words ? (static_cast<uint64_t>(bits[w]) >> (player & 63)) & 1 : false;
}

}  // namespace xaifast
