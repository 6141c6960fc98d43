#pragma once

#include <cstdint>

#include "xaifast/status.h"

namespace xaifast {

// Units: (input b, point n) linearised as b * n_points + n; a call makes the rows of units [start, stop).
struct PerturbRows {
  uint8_t* out;                   // [stop - start, F]
  const uint8_t* x;               // [B, F]
  const uint8_t* insertion;       // [1, F] or [B, F]
  const uint8_t* deletion;        // [1, F] or [B, F]
  const int32_t* rank;            // [1, P] or [B, P]; below 0: x is always shown
  const int64_t* points;          // [N, 2]: count, and 0 for insertion or else deletion
  int64_t entry_bytes;            // unit * itemsize: the bytes that share one entry
  int64_t n_points, rep, period;  // N, F / (P * unit), P
  bool insertion_per_input, deletion_per_input, rank_per_input;
  int64_t start, stop;
  int n_threads;
};

}  // namespace xaifast
