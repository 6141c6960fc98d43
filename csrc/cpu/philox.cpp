#include "xaifast/philox.h"

#include "bytes.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace xaifast::XAIFAST_ISA {
namespace {

constexpr int64_t kLanes = kVectorBytes / sizeof(uint64_t);  // calls a vector
constexpr int64_t kVectors = kPhiloxBlock / kLanes;          // independent chains at once: a round waits for the last

// 64-bit products of the lower halves of the lanes; the upper halves may hold anything.
inline Vector multiply_halves(Vector a, Vector b) {
#if defined(__AVX512F__)
  return (Vector)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, (__m512i)b);  // GCC 12 warns about the plain one
#elif defined(__AVX2__)
  return (Vector)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__) && !defined(__AVX__)
  return (Vector)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF);
#endif
}

}  // namespace

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) of the counters
// counter + (i, 0, 0, 0); a call gives two words. The lower half of each 64-bit lane holds a 32-bit number.
void philox_words(uint64_t* words /* [2 n_calls] */, int64_t n_calls, Philox4 counter, PhiloxKey key) {
  // Calls are put into lanes so that interleaving the words of lanes 0, 2, ... and of lanes 1, 3, ... is their order.
  Vector order, even, odd;
  for (int64_t i = 0; i < kLanes; ++i) {
    order[i] = i % 2 * (kLanes / 2) + i / 2;
    even[i] = i % 2 * kLanes + i / 2 * 2;
    odd[i] = even[i] + 1;
  }
  const Vector zero{}, factor0 = zero + 0xD2511F53u, factor1 = zero + 0xCD9E8D57u;
  uint8_t* out = reinterpret_cast<uint8_t*>(words);
  for (int64_t call = 0; call < n_calls; call += kPhiloxBlock) {
    Vector c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) {
      c0[v] = order + (counter.lane[0] + static_cast<uint64_t>(call + v * kLanes));
      c1[v] = zero + counter.lane[1];
      c2[v] = zero + counter.lane[2];
      c3[v] = zero + counter.lane[3];
    }
    uint32_t key0 = key.lane[0], key1 = key.lane[1];
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      for (int64_t v = 0; v < kVectors; ++v) {
        const Vector product0 = multiply_halves(c0[v], factor0), product1 = multiply_halves(c2[v], factor1);
        c0[v] = product1 >> 32 ^ c1[v] ^ key0;
        c1[v] = product1;
        c2[v] = product0 >> 32 ^ c3[v] ^ key1;
        c3[v] = product0;
      }
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    for (int64_t v = 0; v < kVectors; ++v, out += 2 * kVectorBytes) {
      const Vector low = (c0[v] & 0xFFFFFFFF) | c1[v] << 32, high = (c2[v] & 0xFFFFFFFF) | c3[v] << 32;
      store(out, __builtin_shuffle(low, high, even));
      store(out + kVectorBytes, __builtin_shuffle(low, high, odd));
    }
  }
}

}  // namespace xaifast::XAIFAST_ISA
