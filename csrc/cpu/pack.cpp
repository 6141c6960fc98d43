#include <cstring>

#include "bytes.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Presence as bytes and as bits: player i of a row is byte i, or bit i % 64 of word i / 64.
namespace xaifast::XAIFAST_ISA {
namespace {

constexpr int64_t kAhead = 4096;  // bytes asked for before they are read; the hardware's own prefetching is too late

// Bit i of the result: whether byte i of 64 is not zero.
inline uint64_t bits_of(const uint8_t* bytes /* [64] */) {
#if defined(__AVX512BW__)
  const __m512i all = _mm512_loadu_si512(bytes);
  return _mm512_test_epi8_mask(all, all);
#elif defined(__x86_64__)
  uint64_t zeros = 0;
  for (int i = 0; i < 64; i += 16) {
    const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + i));
    const int mask = _mm_movemask_epi8(_mm_cmpeq_epi8(part, _mm_setzero_si128()));
    zeros |= static_cast<uint64_t>(static_cast<uint32_t>(mask)) << i;
  }
  return ~zeros;
#else
  uint64_t bits = 0;
  for (int i = 0; i < 64; ++i) bits |= static_cast<uint64_t>(bytes[i] != 0) << i;
  return bits;
#endif
}

// Bytes of one and zero from the bits of a word.
inline void bytes_of(uint8_t* bytes /* [64] */, uint64_t word) {
#if defined(__AVX512BW__)
  _mm512_storeu_si512(bytes, _mm512_maskz_set1_epi8(word, 1));
#elif defined(__x86_64__)
  const __m128i twice = _mm_unpacklo_epi8(_mm_cvtsi64_si128(word), _mm_cvtsi64_si128(word));
  const __m128i low = _mm_unpacklo_epi16(twice, twice), high = _mm_unpackhi_epi16(twice, twice);
  const __m128i eights[4] = {_mm_shuffle_epi32(low, 0x50), _mm_shuffle_epi32(low, 0xFA), _mm_shuffle_epi32(high, 0x50),
                             _mm_shuffle_epi32(high, 0xFA)};  // each byte of the word eight times
  const __m128i bit = _mm_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  for (int i = 0; i < 4; ++i) {
    const __m128i there = _mm_cmpeq_epi8(_mm_and_si128(eights[i], bit), bit);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + 16 * i), _mm_and_si128(there, _mm_set1_epi8(1)));
  }
#else
  for (int i = 0; i < 64; ++i) bytes[i] = word >> i & 1;
#endif
}

}  // namespace

// Whole blocks are read and written: what lies beyond a row is masked out, or written again by the next row. The last
// blocks of all, which would pass the end, are copied.
void pack_bits(int64_t* bits /* [N, W] */, const uint8_t* present /* [N, M] */, int64_t n_rows, int64_t n_players) {
  const uint8_t* end = present + n_rows * n_players;
  for (int64_t row = 0; row < n_rows; ++row, present += n_players) {
    for (int64_t player = 0; player < n_players; player += 64) {
      const uint8_t* bytes = present + player;
      __builtin_prefetch(bytes + kAhead);
      uint8_t block[64];
      if (end - bytes < 64) {
        std::memset(block, 0, 64);
        bytes = static_cast<const uint8_t*>(std::memcpy(block, bytes, end - bytes));
      }
      const int64_t left = n_players - player;
      const uint64_t mask = left < 64 ? (uint64_t{1} << left) - 1 : ~uint64_t{0};
      *bits++ = static_cast<int64_t>(bits_of(bytes) & mask);
    }
  }
}

void unpack_bits(uint8_t* present /* [N, M] */, const int64_t* bits /* [N, W] */, int64_t n_rows, int64_t n_players) {
  const uint8_t* end = present + n_rows * n_players;
  for (int64_t row = 0; row < n_rows; ++row, present += n_players) {
    for (int64_t player = 0; player < n_players; player += 64) {
      uint8_t* bytes = present + player;
      const uint64_t word = static_cast<uint64_t>(*bits++);
      if (end - bytes >= 64) {
        bytes_of(bytes, word);
      } else {
        uint8_t block[64];
        bytes_of(block, word);
        std::memcpy(bytes, block, end - bytes);
      }
    }
  }
}

}  // namespace xaifast::XAIFAST_ISA
