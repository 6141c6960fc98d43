#pragma once

#include "xaifast/cubic.h"
#include "xaifast/occlude.h"
#include "xaifast/perturb.h"
#include "xaifast/philox.h"
#include "xaifast/rows.h"

namespace xaifast {

// One set of kernels per instruction set, same source, same bytes.
struct Kernels {
  const char* isa;
  Status (*select_rows)(const SelectRows&);
  int64_t (*compact_rows)(const CompactRows&, int n_threads);  // returns the units with more than `length` tokens
  Status (*cubic_regression)(const CubicRegression&);
  void (*philox_words)(uint64_t* words /* [2 n_calls] */, int64_t n_calls, Philox4 counter, PhiloxKey key);
  void (*pack_bits)(int64_t* bits /* [N, W] */, const uint8_t* present /* [N, M] */, int64_t n_rows, int64_t n_players);
  void (*unpack_bits)(uint8_t* present /* [N, M] */, const int64_t* bits /* [N, W] */, int64_t n_rows,
                      int64_t n_players);
  void (*perturb_rows)(const PerturbRows&);
  void (*occlude_step)(const OccludeRows&, void* tile /* T [stop - start, H], in place unless first */, bool first,
                       Step, double slope);
  void (*occlude_certify)(const OccludeRows&, const OccludeBounds&, uint8_t* certified /* [stop - start] */);
};

#define XAIFAST_DECLARE_ISA(isa)                                                        \
  namespace isa {                                                                       \
  Status select_rows(const SelectRows& a);                                              \
  int64_t compact_rows(const CompactRows& a, int n_threads);                            \
  Status cubic_regression(const CubicRegression& a);                                    \
  void philox_words(uint64_t*, int64_t n_calls, Philox4 counter, PhiloxKey);            \
  void pack_bits(int64_t*, const uint8_t*, int64_t n_rows, int64_t n_players);          \
  void unpack_bits(uint8_t*, const int64_t*, int64_t n_rows, int64_t n_players);        \
  void perturb_rows(const PerturbRows& a);                                              \
  void occlude_step(const OccludeRows& a, void* tile, bool first, Step, double slope);  \
  void occlude_certify(const OccludeRows& a, const OccludeBounds&, uint8_t* certified); \
  }
XAIFAST_DECLARE_ISA(baseline)
XAIFAST_DECLARE_ISA(v3)
XAIFAST_DECLARE_ISA(v4)
#undef XAIFAST_DECLARE_ISA

constexpr int kMaxIsas = 3;

// The kernels compiled in, slowest first; returns how many.
int compiled_kernels(Kernels (&table)[kMaxIsas]);
bool cpu_has(const char* isa);

}  // namespace xaifast
