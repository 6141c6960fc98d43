#pragma once

#include <cstdint>

#include "xaifast/status.h"

namespace xaifast {

// Units: (input b, coalition c) linearised as b * n_coalitions + c; a call makes the rows of units [start, stop).
struct SelectRows {
  uint8_t* out;                                            // [stop - start, R, F]
  const uint8_t* x;                                        // [B, F]
  const uint8_t* baseline;                                 // [R, F] or [B, R, F]
  const int64_t* bits;                                     // [N, W] or [B, N, W]
  const int32_t* index;                                    // [P] or [B, P]; player of an entry, as is_present takes it
  int64_t entry_bytes;                                     // unit * itemsize: the bytes that share one entry
  int64_t n_coalitions, n_background, rep, period, words;  // N, R, F / (P * unit), P, W
  bool bits_per_input, index_per_input, baseline_per_input;
  int64_t start, stop;
  int n_threads;
};

struct CompactRows {
  uint8_t* out;          // [stop - start, length, row_bytes]
  const uint8_t* x;      // [B, T, row_bytes]
  const int64_t* bits;   // [N, W] or [B, N, W]
  const int32_t* index;  // [T] or [B, T]; player of a token, as is_present takes it
  int64_t row_bytes, n_coalitions, n_tokens, length, words;
  bool bits_per_input, index_per_input;
  int64_t start, stop;
};

}  // namespace xaifast
