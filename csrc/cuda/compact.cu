#include "xaifast/bits.h"
#include "xaifast/cuda_rows.h"
#include "xaifast/device_guard.h"

namespace xaifast::cuda {
namespace {

constexpr int kWarpsPerBlock = 4;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// One warp makes one output row: it walks the tokens 32 at a time, one ballot a group, remembers the token of its rank,
// then copies that token's row word by word. It must see every group, since a unit with too many tokens is filled with
// 0xFF. Reads index and bits from cache; moves 2 * row_bytes per present row.
template <typename Word>
__global__ void __launch_bounds__(32 * kWarpsPerBlock) compact_rows_kernel(const CompactRows a) {
  const int lane = threadIdx.x & 31;
  const int64_t rows = (a.stop - a.start) * a.length;
  const int64_t row_words = a.row_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarpsPerBlock;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + (threadIdx.x >> 5); row < rows; row += warps) {
    const int64_t u = a.start + row / a.length, rank = row % a.length;
    const int64_t b = u / a.n_coalitions, c = u % a.n_coalitions;
    const int64_t* __restrict__ bits = a.bits + (a.bits_per_input ? u : c) * a.words;        // [W]
    const int32_t* __restrict__ index = a.index + (a.index_per_input ? b * a.n_tokens : 0);  // [T]
    int64_t count = 0, token = -1;
    for (int64_t group = 0; group < a.n_tokens; group += 32) {
      const int64_t t = group + lane;
      const unsigned present = __ballot_sync(kAllLanes, t < a.n_tokens && is_present(bits, a.words, index[t]));
      const int64_t k = rank - count;
      if (token < 0 && k < 32) {
        const int position = nth_set_bit(present, static_cast<int>(k));
        if (position >= 0) token = group + position;
      }
      count += __popc(present);
    }
    Word* __restrict__ out = reinterpret_cast<Word*>(a.out) + row * row_words;  // [row_words]
    if (token >= 0 && count <= a.length) {
      const Word* __restrict__ x = reinterpret_cast<const Word*>(a.x) + (b * a.n_tokens + token) * row_words;
      for (int64_t i = lane; i < row_words; i += 32) out[i] = x[i];
    } else {
      Word fill;
      memset(&fill, count > a.length ? 0xFF : 0, sizeof(fill));
      for (int64_t i = lane; i < row_words; i += 32) out[i] = fill;
    }
  }
}

template <typename Word>
bool fits(const CompactRows& a) {
  const auto bits =
      reinterpret_cast<uintptr_t>(a.out) | reinterpret_cast<uintptr_t>(a.x) | static_cast<uintptr_t>(a.row_bytes);
  return bits % sizeof(Word) == 0;
}

}  // namespace

cudaError_t compact_rows(const CompactRows& a, int device, cudaStream_t stream) {
  const int64_t rows = (a.stop - a.start) * a.length;
  if (rows == 0 || a.row_bytes == 0) return cudaSuccess;
  DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const int64_t blocks = (rows + kWarpsPerBlock - 1) / kWarpsPerBlock;
  const unsigned grid = static_cast<unsigned>(blocks < 0x7FFFFFFF ? blocks : 0x7FFFFFFF);
  const unsigned threads = 32 * kWarpsPerBlock;
  if (fits<uint4>(a)) {
    compact_rows_kernel<uint4><<<grid, threads, 0, stream>>>(a);
  } else if (fits<uint32_t>(a)) {
    compact_rows_kernel<uint32_t><<<grid, threads, 0, stream>>>(a);
  } else {
    compact_rows_kernel<uint8_t><<<grid, threads, 0, stream>>>(a);
  }
  return cudaGetLastError();
}

}  // namespace xaifast::cuda
