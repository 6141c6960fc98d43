#pragma once

#include <cstdint>

#include "xaifast/status.h"

namespace xaifast {

// In which order equal values and NaNs come; NaNs are equal to each other.
enum class TieOrder {
  kIndex,          // equal values by ascending index, NaNs last
  kNanFirst,       // equal values by ascending index, NaNs first
  kReversedIndex,  // equal values by descending index, NaNs first
};

struct RankFeatures {
  int32_t* rank;       // [B, M]: places in descending order
  const void* values;  // [B, M]
  int64_t n_inputs, n_features;
  int itemsize;       // 2, 4 or 8
  uint64_t infinity;  // bits of infinity in a floating format; 0: signed integers
  TieOrder ties;
  bool least;  // the whole order reversed
  int n_threads;
};

Status rank_features(const RankFeatures& a);

}  // namespace xaifast
