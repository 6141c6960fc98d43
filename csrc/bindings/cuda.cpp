#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "xaifast/cuda_rows.h"

namespace py = pybind11;
using namespace xaifast;

namespace {

void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

void require_success(cudaError_t error, const char* function) {
  if (error == cudaSuccess) return;
  std::string text = std::string(function) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice) text += " (this build has sm " XAIFAST_CUDA_ARCHS ")";
  throw std::runtime_error(text);
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void py_compact_rows(uintptr_t out, uintptr_t x, uintptr_t bits, uintptr_t index, int64_t row_bytes, int64_t n_inputs,
                     int64_t n_coalitions, int64_t n_tokens, int64_t length, int64_t words, bool bits_per_input,
                     bool index_per_input, int64_t start, int64_t stop, int device, uintptr_t stream) {
  require(n_inputs >= 0 && n_coalitions >= 0 && row_bytes >= 0 && n_tokens >= 0 && length >= 0 && words >= 0,
          "compact_rows: sizes must not be negative");
  require(0 <= start && start <= stop && stop <= n_inputs * n_coalitions,
          "compact_rows: 0 <= start <= stop <= n_inputs * n_coalitions must hold");
  require(device >= 0, "compact_rows: device must not be negative");
  const CompactRows rows{pointer<uint8_t>(out),
                         pointer<const uint8_t>(x),
                         pointer<const int64_t>(bits),
                         pointer<const int32_t>(index),
                         row_bytes,
                         n_coalitions,
                         n_tokens,
                         length,
                         words,
                         bits_per_input,
                         index_per_input,
                         start,
                         stop};
  require_success(cuda::compact_rows(rows, device, pointer<CUstream_st>(stream)), "compact_rows");
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "xaifast's CUDA kernels. Pointers and streams are integers; nothing synchronises.";
  m.def("compact_rows", &py_compact_rows, py::call_guard<py::gil_scoped_release>());
  m.def("build_info", [] {
    py::dict info;
    info["archs"] = py::str(XAIFAST_CUDA_ARCHS).attr("split")(",");
    info["cuda"] = XAIFAST_CUDA_VERSION;
    return info;
  });
}
