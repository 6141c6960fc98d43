#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "xaifast/bits.h"
#include "xaifast/coalitions.h"
#include "xaifast/kernels.h"
#include "xaifast/philox.h"
#include "xaifast/rank.h"

namespace py = pybind11;
using namespace xaifast;

namespace {

Kernels kernels;

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

struct Memory {
  uintptr_t address;
  int64_t bytes;
};

bool apart(Memory a, Memory b) {
  return a.bytes == 0 || b.bytes == 0 || a.address + a.bytes <= b.address || b.address + b.bytes <= a.address;
}

// The fastest kernels this processor runs, or those named by XAIFAST_CPU_ISA.
Kernels choose_kernels(const Kernels* table, int count) {
  const char* wanted = std::getenv("XAIFAST_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    while (count > 1 && !cpu_has(table[count - 1].isa)) --count;
    return table[count - 1];
  }
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (std::string(wanted) == table[i].isa) {
      if (cpu_has(wanted)) return table[i];
      throw py::import_error("XAIFAST_CPU_ISA=" + std::string(wanted) +
                             ": this processor lacks these instructions; unset it to use the best it has");
    }
    names += (i ? ", " : "") + std::string(table[i].isa);
  }
  throw py::import_error("XAIFAST_CPU_ISA must be one of " + names + ", got '" + wanted + "'");
}

void py_select_rows(uintptr_t out, uintptr_t x, uintptr_t baseline, uintptr_t bits, uintptr_t index, int64_t itemsize,
                    int64_t n_inputs, int64_t n_coalitions, int64_t n_background, int64_t rep, int64_t period,
                    int64_t unit, int64_t words, bool bits_per_input, bool index_per_input, bool baseline_per_input,
                    int64_t start, int64_t stop, int n_threads) {
  require(itemsize == 1 || itemsize == 2 || itemsize == 4 || itemsize == 8,
          "select_rows: itemsize must be 1, 2, 4 or 8");
  require(n_inputs >= 0 && n_coalitions >= 0 && n_background >= 0 && rep >= 0 && period >= 0 && unit >= 0 && words >= 0,
          "select_rows: sizes must not be negative");
  require(0 <= start && start <= stop && stop <= n_inputs * n_coalitions,
          "select_rows: 0 <= start <= stop <= n_inputs * n_coalitions must hold");
  if (start == stop || n_background * rep * period * unit == 0) return;
  require(out && x && baseline && (bits || words == 0) && index, "select_rows: null pointer");
  const Status status = kernels.select_rows(
      {pointer<uint8_t>(out), pointer<const uint8_t>(x), pointer<const uint8_t>(baseline), pointer<const int64_t>(bits),
       pointer<const int32_t>(index), unit * itemsize, n_coalitions, n_background, rep, period, words, bits_per_input,
       index_per_input, baseline_per_input, start, stop, n_threads < 1 ? 1 : n_threads});
  if (status == Status::kNoMemory) throw std::bad_alloc();
}

int64_t py_compact_rows(uintptr_t out, uintptr_t x, uintptr_t bits, uintptr_t index, int64_t row_bytes,
                        int64_t n_inputs, int64_t n_coalitions, int64_t n_tokens, int64_t length, int64_t words,
                        bool bits_per_input, bool index_per_input, int64_t start, int64_t stop, int n_threads) {
  require(n_inputs >= 0 && n_coalitions >= 0 && row_bytes >= 0 && n_tokens >= 0 && length >= 0 && words >= 0,
          "compact_rows: sizes must not be negative");
  require(0 <= start && start <= stop && stop <= n_inputs * n_coalitions,
          "compact_rows: 0 <= start <= stop <= n_inputs * n_coalitions must hold");
  if (start == stop) return 0;
  require(n_tokens == 0 || ((bits || words == 0) && index), "compact_rows: null pointer");
  require(length * row_bytes == 0 || out, "compact_rows: null pointer");
  require(length * row_bytes * n_tokens == 0 || x, "compact_rows: null pointer");
  const int64_t n_rows = bits_per_input ? n_inputs * n_coalitions : n_coalitions;
  const Memory written{out, (stop - start) * length * row_bytes};
  require(apart(written, {x, n_inputs * n_tokens * row_bytes}) && apart(written, {bits, n_rows * words * 8}) &&
              apart(written, {index, (index_per_input ? n_inputs : 1) * n_tokens * 4}),
          "xaifast.compact_rows: out must share no memory with x, bits and index; give a buffer of its own");
  static uint8_t nothing;  // memcpy and memset take no null, not even for no bytes; an empty tensor's address is null
  return kernels.compact_rows({out ? pointer<uint8_t>(out) : &nothing, x ? pointer<const uint8_t>(x) : &nothing,
                               pointer<const int64_t>(bits), pointer<const int32_t>(index), row_bytes, n_coalitions,
                               n_tokens, length, words, bits_per_input, index_per_input, start, stop},
                              n_threads < 1 ? 1 : n_threads);
}

void py_cubic_regression(uintptr_t columns, uintptr_t weights, uintptr_t size_weights, uintptr_t diagonal, uintptr_t y,
                         uintptr_t probes, uintptr_t alpha, uintptr_t quadratic, uintptr_t log_determinant,
                         uintptr_t inverse_diagonal, uintptr_t info, int64_t n_outputs, int64_t n_rows,
                         int64_t n_players, int64_t n_sizes, int64_t n_probes, int n_threads) {
  require(n_outputs >= 0 && n_rows >= 0 && n_players >= 0 && n_sizes >= 0 && n_probes >= 0,
          "cubic_regression: sizes must not be negative");
  if (n_outputs == 0) return;
  require(n_rows > 0 && n_players > 0, "cubic_regression: a row and a player are needed");
  require(columns && weights && size_weights && diagonal && y && (probes || n_probes == 0),
          "cubic_regression: null pointer");
  require(alpha && quadratic && log_determinant && info, "cubic_regression: null pointer");
  const Status status = kernels.cubic_regression(
      {pointer<const double>(columns), pointer<const double>(weights), pointer<const double>(size_weights),
       pointer<const double>(diagonal), pointer<const double>(y), pointer<const double>(probes), pointer<double>(alpha),
       pointer<double>(quadratic), pointer<double>(log_determinant), pointer<double>(inverse_diagonal),
       pointer<int32_t>(info), n_outputs, n_rows, n_players, n_sizes, n_probes, n_threads < 1 ? 1 : n_threads});
  if (status == Status::kNoMemory) throw std::bad_alloc();
}

void py_perturb_rows(uintptr_t out, uintptr_t x, uintptr_t insertion, uintptr_t deletion, uintptr_t rank,
                     uintptr_t points, int64_t itemsize, int64_t n_inputs, int64_t n_points, int64_t rep,
                     int64_t period, int64_t unit, bool insertion_per_input, bool deletion_per_input,
                     bool rank_per_input, int64_t start, int64_t stop, int n_threads) {
  require(itemsize == 1 || itemsize == 2 || itemsize == 4 || itemsize == 8,
          "perturb_rows: itemsize must be 1, 2, 4 or 8");
  require(n_inputs >= 0 && n_points >= 0 && rep >= 0 && period >= 0 && unit >= 0,
          "perturb_rows: sizes must not be negative");
  require(0 <= start && start <= stop && stop <= n_inputs * n_points,
          "perturb_rows: 0 <= start <= stop <= n_inputs * n_points must hold");
  if (start == stop || rep * period * unit == 0) return;
  require(out && x && insertion && deletion && rank && points, "perturb_rows: null pointer");
  kernels.perturb_rows({pointer<uint8_t>(out), pointer<const uint8_t>(x), pointer<const uint8_t>(insertion),
                        pointer<const uint8_t>(deletion), pointer<const int32_t>(rank), pointer<const int64_t>(points),
                        unit * itemsize, n_points, rep, period, insertion_per_input, deletion_per_input, rank_per_input,
                        start, stop, n_threads < 1 ? 1 : n_threads});
}

OccludeRows occlude_rows(uintptr_t x, uintptr_t columns, uintptr_t base, uintptr_t rows, uintptr_t order,
                         uintptr_t offsets, int64_t n_elements, int64_t n_players, int64_t width, int64_t start,
                         int64_t stop, bool order_per_input, bool is_double, int n_threads) {
  require(n_elements > 0 && n_players > 0 && width > 0 && 0 <= start && start <= stop,
          "occlude: sizes must be positive and 0 <= start <= stop must hold");
  require(start == stop || (x && columns && base && rows && (!order || offsets)), "occlude: null pointer");
  return {pointer<const void>(x),
          pointer<const void>(columns),
          pointer<const void>(base),
          pointer<const int64_t>(rows),
          pointer<const int64_t>(order),
          pointer<const int64_t>(offsets),
          n_elements,
          n_players,
          width,
          start,
          stop,
          order_per_input,
          is_double,
          n_threads < 1 ? 1 : n_threads};
}

template <typename... Rows>
void py_occlude_step(uintptr_t tile, bool first, int step, double slope, Rows... rows) {
  require(0 <= step && step <= static_cast<int>(Step::kSilu), "occlude_step: unknown step");
  require(tile, "occlude_step: null pointer");
  kernels.occlude_step(occlude_rows(rows...), pointer<void>(tile), first, static_cast<Step>(step), slope);
}

template <typename... Rows>
void py_occlude_certify(uintptr_t certified, uintptr_t largest, uintptr_t norms, uintptr_t nearest, uintptr_t radius,
                        Rows... rows) {
  require(certified && largest && norms && nearest && radius, "occlude_certify: null pointer");
  kernels.occlude_certify(occlude_rows(rows...),
                          {pointer<const void>(largest), pointer<const void>(norms), pointer<const void>(nearest),
                           pointer<const void>(radius)},
                          pointer<uint8_t>(certified));
}

void py_rank_features(uintptr_t rank, uintptr_t values, int64_t n_inputs, int64_t n_features, int itemsize,
                      uint64_t infinity, int ties, bool least, int n_threads) {
  require(itemsize == 2 || itemsize == 4 || itemsize == 8, "rank_features: itemsize must be 2, 4 or 8");
  require(n_inputs >= 0 && 0 <= n_features && n_features <= INT32_MAX, "rank_features: sizes out of range");
  require(0 <= ties && ties <= 2, "rank_features: ties must be index 0, NaN first 1 or reversed index 2");
  if (n_inputs * n_features == 0) return;
  require(rank && values, "rank_features: null pointer");
  const Status status =
      rank_features({pointer<int32_t>(rank), pointer<const void>(values), n_inputs, n_features, itemsize, infinity,
                     static_cast<TieOrder>(ties), least, n_threads < 1 ? 1 : n_threads});
  if (status == Status::kNoMemory) throw std::bad_alloc();
}

void py_sample_coalitions(int64_t n_players, int64_t n_samples, int design, uint64_t seed, uint64_t block,
                          uintptr_t bits, uintptr_t weights) {
  require(0 <= design && design <= 3, "sample_coalitions: design must be leverage 0, kernel 1, chain 2 or grouped 3");
  require(bits && weights, "sample_coalitions: null pointer");
  const char* error = sample_coalitions(kernels, n_players, n_samples, static_cast<Design>(design), seed, block,
                                        pointer<int64_t>(bits), pointer<double>(weights));
  require(error == nullptr, error);
}

void py_philox_words(uintptr_t words, int64_t n_calls, std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  require(n_calls >= 0 && n_calls % kPhiloxBlock == 0, "philox_words: n_calls must be a multiple of 8");
  require(words || n_calls == 0, "philox_words: null pointer");
  kernels.philox_words(pointer<uint64_t>(words), n_calls, {{counter[0], counter[1], counter[2], counter[3]}},
                       {{key[0], key[1]}});
}

void py_pack_bits(uintptr_t bits, uintptr_t present, int64_t n_rows, int64_t n_players) {
  require(n_rows >= 0 && n_players >= 0, "pack_bits: sizes must not be negative");
  if (n_rows * n_players == 0) return;
  require(bits && present, "pack_bits: null pointer");
  kernels.pack_bits(pointer<int64_t>(bits), pointer<const uint8_t>(present), n_rows, n_players);
}

void py_unpack_bits(uintptr_t present, uintptr_t bits, int64_t n_rows, int64_t n_players) {
  require(n_rows >= 0 && n_players >= 0, "unpack_bits: sizes must not be negative");
  if (n_rows * n_players == 0) return;
  require(bits && present, "unpack_bits: null pointer");
  kernels.unpack_bits(pointer<uint8_t>(present), pointer<const int64_t>(bits), n_rows, n_players);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "xaifast's CPU kernels. Pointers are integers; callers own the checks of shapes and dtypes.";
  Kernels table[kMaxIsas];
  const int count = compiled_kernels(table);
  kernels = choose_kernels(table, count);
  py::tuple isas(count);
  for (int i = 0; i < count; ++i) isas[i] = table[i].isa;

  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("select_rows", &py_select_rows, release);
  m.def("compact_rows", &py_compact_rows, release);
  m.def("cubic_regression", &py_cubic_regression, release);
  m.def("perturb_rows", &py_perturb_rows, release);
  m.def("occlude_step",
        &py_occlude_step<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t,
                         int64_t, int64_t, bool, bool, int>,
        release);
  m.def("occlude_certify",
        &py_occlude_certify<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t,
                            int64_t, int64_t, bool, bool, int>,
        release);
  m.def("rank_features", &py_rank_features, release);
  m.def("sample_coalitions", &py_sample_coalitions, release);
  m.def("nth_set_bit", [](uint32_t word, int k) { return nth_set_bit(word, k); });
  m.def("philox_words", &py_philox_words);
  m.def("pack_bits", &py_pack_bits, release);
  m.def("unpack_bits", &py_unpack_bits, release);
  m.def("build_info", [isas] {
    py::dict info;
    info["version"] = XAIFAST_VERSION;
    info["isa"] = kernels.isa;
    info["isas"] = py::list(isas);
    py::list supported;
    for (const py::handle& isa : isas) {
      if (cpu_has(isa.cast<std::string>().c_str())) supported.append(isa);
    }
    info["supported"] = supported;
    info["compiler"] = __VERSION__;
#if defined(_OPENMP)
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
    return info;
  });
}
