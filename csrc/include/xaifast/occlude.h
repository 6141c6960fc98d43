#pragma once

#include <cstdint>

namespace xaifast {

// What an activation loses when its input falls from z to z - d, and what it must know of z (the planes of `base`).
enum class Step : int32_t {
  kLinear,   // nothing
  kRelu,     // z
  kLeaky,    // z
  kSigmoid,  // z, sigmoid(z), sigmoid(-z)
  kTanh,     // z, sigmoid(2 z), sigmoid(-2 z)
  kSilu      // as kSigmoid
};

// Row r stands for sample b = rows[r] / n_players and player m = rows[r] % n_players. Its first-layer change is
// d = sum of x[b, i] * columns[i, :] over the player's elements i. A call serves rows [start, stop). T is float, or
// double where `is_double`.
struct OccludeRows {
  const void* x;                         // T [B, N]
  const void* columns;                   // T [N, H]: the update of the first layer's weight, transposed
  const void* base;                      // T [B, planes, H]
  const int64_t* rows;                   // [R]
  const int64_t* order;                  // [1, N] or [B, N]: elements sorted by player; null: player m is element m
  const int64_t* offsets;                // [1, M + 1] or [B, M + 1]: where a player's elements begin in order
  int64_t n_elements, n_players, width;  // N, M, H
  int64_t start, stop;
  bool order_per_input, is_double;
  int n_threads;
};

// Whose sign changes at most: bounds that spare the look at each unit.
struct OccludeBounds {
  const void* largest;  // T [N]: max over h of |columns[i, h]|
  const void* norms;    // T [N]: Euclidean norm of columns[i, :]
  const void* nearest;  // T [B]: min over h of |z[b, h]|
  const void* radius;   // T [B]: while the norm of d is smaller, no unit of a later layer changes sign
};

}  // namespace xaifast
