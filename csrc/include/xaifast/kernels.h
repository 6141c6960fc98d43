#pragma once

#include "xaifast/cubic.h"
#include "xaifast/rows.h"

namespace xaifast {

// One set of kernels per instruction set, same source, same bytes.
struct Kernels {
  const char* isa;
  Status (*select_rows)(const SelectRows&);
  int64_t (*compact_rows)(const CompactRows&, int n_threads);  // returns the units with more than `length` tokens
  Status (*cubic_regression)(const CubicRegression&);
};

#define XAIFAST_DECLARE_ISA(isa)                             \
  namespace isa {                                            \
  Status select_rows(const SelectRows& a);                   \
  int64_t compact_rows(const CompactRows& a, int n_threads); \
  Status cubic_regression(const CubicRegression& a);         \
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
