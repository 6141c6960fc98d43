#pragma once

#include <cuda_runtime_api.h>

#include "xaifast/rows.h"

namespace xaifast::cuda {

// Enqueues the compaction of a.start..a.stop on `stream` of `device`; never synchronises. A unit with more than
// a.length present tokens is filled with 0xFF bytes, which is NaN in every floating dtype.
cudaError_t compact_rows(const CompactRows& a, int device, cudaStream_t stream);

}  // namespace xaifast::cuda
