#include <pybind11/pybind11.h>

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "xaifast/coalitions.h"
#include "xaifast/kernels.h"
#include "xaifast/philox.h"

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

void py_sample_coalitions(int64_t n_players, int64_t n_samples, int design, uint64_t seed, uint64_t block,
                          uintptr_t bits, uintptr_t weights) {
  require(0 <= design && design <= 3, "sample_coalitions: design must be leverage 0, kernel 1, chain 2 or grouped 3");
  require(bits && weights, "sample_coalitions: null pointer");
  const char* error = sample_coalitions(n_players, n_samples, static_cast<Design>(design), seed, block,
                                        pointer<int64_t>(bits), pointer<double>(weights));
  require(error == nullptr, error);
}

std::array<uint32_t, 4> py_philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  const Philox4 value = philox4x32({{c0, c1, c2, c3}}, k0, k1);
  return {value.lane[0], value.lane[1], value.lane[2], value.lane[3]};
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
  m.def("sample_coalitions", &py_sample_coalitions, release);
  m.def("nth_set_bit", [](uint32_t word, int k) { return nth_set_bit(word, k); });
  m.def("philox", [](py::sequence counter, py::sequence key) {
    require(counter.size() == 4 && key.size() == 2, "philox: a counter of 4 words and a key of 2 are needed");
    const auto word = [](const py::handle& item) { return item.cast<uint32_t>(); };
    const auto v =
        py_philox(word(counter[0]), word(counter[1]), word(counter[2]), word(counter[3]), word(key[0]), word(key[1]));
    return py::make_tuple(v[0], v[1], v[2], v[3]);
  });
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
