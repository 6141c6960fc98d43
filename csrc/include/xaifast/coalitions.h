#pragma once

#include <cstdint>

#include "xaifast/kernels.h"

namespace xaifast {

enum class Design : int { kLeverage = 0, kKernel = 1, kChain = 2, kGrouped = 3 };

// Fills a paired coalition design: row 0 full, row 1 empty, then rows 2 + 2p and 3 + 2p a coalition and its complement.
// n_samples is the design's exact row count N. Returns null, or what is wrong with the arguments.
const char* sample_coalitions(const Kernels& kernels, int64_t n_players, int64_t n_samples, Design design,
                              uint64_t seed, uint64_t block, int64_t* bits /* [N, W] */, double* weights /* [N] */);

}  // namespace xaifast
