#pragma once

#include <cstdint>

#include "xaifast/status.h"

namespace xaifast {

// A kernel regression for each of B outputs on n observations: V alpha = y with
//   V = a + a^3 + c S S' + diag(d),  a = X diag(w) X',
// by Cholesky's V = L L'. X has entries -1 and +1 (rows of zeros fill it up).
struct CubicRegression {
  const double* columns;       // [n, M + Q], X and S side by side
  const double* weights;       // [B, M], w
  const double* size_weights;  // [B], c
  const double* diagonal;      // [B, n], d
  const double* y;             // [B, n]
  const double* probes;        // [P, n], signs
  double* alpha;               // [B, n]
  double* quadratic;           // [B], y' alpha
  double* log_determinant;     // [B], of V
  double* inverse_diagonal;    // [B, n] of V^-1, the mean over probes of p * (V^-1 p) if there are any; or null
  int32_t* info;               // [B]: 0, or the first row (from 1) without a positive finite pivot; all else is NaN
  int64_t n_outputs, n_rows, n_players, n_sizes, n_probes;  // B, n, M, Q, P
  int n_threads;
};

}  // namespace xaifast
