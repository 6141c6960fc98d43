#pragma once

#include <cstdint>

#include "xaifast/bits.h"

// Byte movers of the CPU kernels, always inlined: most pieces are a few vectors long, where a call costs as much as the
// copy. A last partial vector is done by a full one that overlaps the one before it.
namespace xaifast {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif
typedef uint64_t Vector __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Vector16 __attribute__((vector_size(16)));
typedef uint64_t Vector32 __attribute__((vector_size(kVectorBytes < 32 ? 16 : 32)));

template <typename T>
XAIFAST_SHARED T load(const uint8_t* in) {
  T value;
  __builtin_memcpy(&value, in, sizeof(T));
  return value;
}

template <typename T>
XAIFAST_SHARED void store(uint8_t* out, T value) {
  __builtin_memcpy(out, &value, sizeof(T));
}

// Copies sizeof(T) <= n <= 2 sizeof(T) bytes.
template <typename T>
XAIFAST_SHARED void copy_two(uint8_t* __restrict__ out, const uint8_t* __restrict__ in, int64_t n) {
  const T tail = load<T>(in + n - sizeof(T));
  store(out, load<T>(in));
  store(out + n - sizeof(T), tail);
}

XAIFAST_SHARED void copy_bytes(uint8_t* __restrict__ out, const uint8_t* __restrict__ in, int64_t n) {
  if (n >= kVectorBytes) {
    for (int64_t i = 0; i < n - kVectorBytes; i += kVectorBytes) store(out + i, load<Vector>(in + i));
    store(out + n - kVectorBytes, load<Vector>(in + n - kVectorBytes));
  } else if (n >= 32) {
    copy_two<Vector32>(out, in, n);
  } else if (n >= 16) {
    copy_two<Vector16>(out, in, n);
  } else if (n >= 8) {
    copy_two<uint64_t>(out, in, n);
  } else if (n >= 4) {
    copy_two<uint32_t>(out, in, n);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = in[i];
  }
}

template <typename T>
XAIFAST_SHARED void blend_piece(uint8_t* __restrict__ out, const uint8_t* __restrict__ x,
                                const uint8_t* __restrict__ baseline, const uint8_t* __restrict__ mask) {
  const T m = load<T>(mask);
  store<T>(out, (load<T>(x) & m) | (load<T>(baseline) & ~m));
}

// out = x where mask is 0xFF, baseline where it is 0x00; all of n bytes.
XAIFAST_SHARED void blend_bytes(uint8_t* __restrict__ out, const uint8_t* __restrict__ x,
                                const uint8_t* __restrict__ baseline, const uint8_t* __restrict__ mask, int64_t n) {
  if (n >= kVectorBytes) {
    for (int64_t i = 0; i < n - kVectorBytes; i += kVectorBytes)
      blend_piece<Vector>(out + i, x + i, baseline + i, mask + i);
    const int64_t i = n - kVectorBytes;
    blend_piece<Vector>(out + i, x + i, baseline + i, mask + i);
  } else {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) blend_piece<uint64_t>(out + i, x + i, baseline + i, mask + i);
    for (; i < n; ++i) blend_piece<uint8_t>(out + i, x + i, baseline + i, mask + i);
  }
}

}  // namespace xaifast
