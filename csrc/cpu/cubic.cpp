#include "xaifast/cubic.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "xaifast/bits.h"

// One thread does the whole regression of an output. Nearly all flops are in one loop: a tile of registers, from which
// products are subtracted one after the other. An element of a matrix is a sum in the order of its index whatever the
// shape of a tile: threads, neighbours and instruction sets do not change a bit.
//
// Matrices are cut into panels of kPanel columns, stored [rows, kPanel]. The factor is U = L' with the rows of a panel
// ending at its diagonal: half of the square, and what a tile reads is contiguous.
namespace xaifast::XAIFAST_ISA {
namespace {

// A tile fills half of the registers. Its vectors lie along the columns.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 8, kTileRows = 8, kTileVectors = 1;
#elif defined(__AVX__)
constexpr int64_t kLanes = 4, kTileRows = 4, kTileVectors = 2;
#else
constexpr int64_t kLanes = 2, kTileRows = 4, kTileVectors = 2;
#endif
constexpr int64_t kPanel = 8, kTileColumns = kLanes * kTileVectors;

typedef double Vector __attribute__((vector_size(kLanes * sizeof(double))));

XAIFAST_SHARED int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

XAIFAST_SHARED Vector load(const double* in) {
  Vector value;
  __builtin_memcpy(&value, in, sizeof(value));
  return value;
}

XAIFAST_SHARED void store(double* out, Vector value) { __builtin_memcpy(out, &value, sizeof(value)); }

// A tile of a panel: kTileRows x kTileColumns in registers.
typedef Vector Tile[kTileRows][kTileVectors];

XAIFAST_SHARED void load_tile(Tile& tile, const double* in) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    for (int64_t v = 0; v < kTileVectors; ++v) tile[r][v] = load(in + r * kPanel + v * kLanes);
  }
}

XAIFAST_SHARED void store_tile(double* out, const Tile& tile) {
  for (int64_t r = 0; r < kTileRows; ++r) {
    for (int64_t v = 0; v < kTileVectors; ++v) store(out + r * kPanel + v * kLanes, tile[r][v]);
  }
}

// tile[r] -= a[r * down] * b for one row b of a panel.
XAIFAST_SHARED void subtract_product(Tile& tile, const double* a, int64_t down, const double* b) {
  Vector row[kTileVectors];
  for (int64_t v = 0; v < kTileVectors; ++v) row[v] = load(b + v * kLanes);
  for (int64_t r = 0; r < kTileRows; ++r) {
    const double factor = a[r * down];
    for (int64_t v = 0; v < kTileVectors; ++v) tile[r][v] -= factor * row[v];
  }
}

// tile -= A' B for `count` rows of two panels.
XAIFAST_SHARED void subtract_products(Tile& tile, const double* a, const double* b, int64_t count) {
  for (int64_t k = 0; k < count; ++k) subtract_product(tile, a + k * kPanel, 1, b + k * kPanel);
}

// The sum of kPanel lanes, always in the same order.
XAIFAST_SHARED double sum_lanes(const double* in) {
  double sums[kPanel / 2];
  for (int64_t c = 0; c < kPanel / 2; ++c) sums[c] = in[c] + in[c + kPanel / 2];
  for (int64_t width = kPanel / 4; width > 0; width /= 2) {
    for (int64_t c = 0; c < width; ++c) sums[c] += sums[c + width];
  }
  return sums[0];
}

// Matrix [n_rows, n_columns] by rows -> [panels, n_columns, kPanel], its rows side by side, filled up with zeros.
void pack_rows(double* out, const double* in, int64_t n_rows, int64_t n_columns) {
  for (int64_t i = 0; i < n_rows; i += kPanel, out += n_columns * kPanel) {
    for (int64_t k = 0; k < n_columns; ++k) {
      for (int64_t c = 0; c < kPanel; ++c) out[k * kPanel + c] = i + c < n_rows ? in[(i + c) * n_columns + k] : 0.0;
    }
  }
}

// Doubles of a factor of n_rows rows.
int64_t factor_size(int64_t n_rows) { return padded(n_rows) * (padded(n_rows) + kPanel) / 2; }

class Regression {
 public:
  // Doubles of work space.
  static int64_t work_size(const CubicRegression& a) {
    return factor_size(a.n_rows) + padded(a.n_rows) * (kPanel + 2) + (a.n_players + a.n_sizes) * kPanel;
  }

  Regression(const CubicRegression& a, const double* columns, const double* probes, double* work)
      : a_(a), columns_(columns), probes_(probes), rows_(padded(a.n_rows)) {
    factor_ = work;
    panel_ = factor_ + factor_size(a.n_rows);
    scaled_ = panel_ + rows_ * kPanel;
    reciprocals_ = scaled_ + (a.n_players + a.n_sizes) * kPanel;
    solution_ = reciprocals_ + rows_;
  }

  void run(int64_t output) {
    const int64_t n = a_.n_rows;
    double* alpha = a_.alpha + output * n;
    double* diagonal = a_.inverse_diagonal ? a_.inverse_diagonal + output * n : nullptr;
    double quadratic = 0.0, log_determinant = 0.0;
    for (int64_t j = 0; j < rows_; j += kPanel) {
      build(output, j);
      substitute(factor_panel(j), 0, j);
      const int64_t bad = factorise_diagonal(j, &log_determinant);
      a_.info[output] = static_cast<int32_t>(bad);
      if (bad != 0) {
        a_.quadratic[output] = a_.log_determinant[output] = NAN;
        for (int64_t i = 0; i < n; ++i) alpha[i] = NAN;
        for (int64_t i = 0; diagonal && i < n; ++i) diagonal[i] = NAN;
        return;
      }
      substitute_output(a_.y + output * n, j);
    }
    for (int64_t i = 0; i < n; ++i) quadratic += solution_[i] * solution_[i];
    a_.quadratic[output] = quadratic;
    a_.log_determinant[output] = log_determinant;
    substitute_output_back();
    memcpy(alpha, solution_, n * sizeof(double));
    if (diagonal && a_.n_probes == 0) invert_diagonal(diagonal);
    if (diagonal && a_.n_probes > 0) probe_diagonal(diagonal);
  }

 private:
  // U's columns from j on (a multiple of kPanel), rows up to the diagonal.
  double* factor_panel(int64_t j) const { return factor_ + j * (j + kPanel) / 2; }

  // Column i of U, its kTileRows neighbours behind it: the next row is kPanel further.
  const double* factor_column(int64_t i) const { return factor_panel(i - i % kPanel) + i % kPanel; }

  // The columns of V from j on, down to the diagonal. Scaling by -w makes subtracted products a sum.
  void build(int64_t output, int64_t j) {
    const int64_t n_players = a_.n_players, n_columns = n_players + a_.n_sizes;
    const double* own = columns_ + j * n_columns;
    for (int64_t k = 0; k < n_columns; ++k) {
      const double weight = k < n_players ? a_.weights[output * n_players + k] : a_.size_weights[output];
      for (int64_t c = 0; c < kPanel; ++c) scaled_[k * kPanel + c] = -weight * own[k * kPanel + c];
    }
    double* out = factor_panel(j);
    for (int64_t i = 0; i < j + kPanel; i += kTileRows) {
      const double* other = columns_ + (i - i % kPanel) * n_columns + i % kPanel;
      for (int64_t c = 0; c < kPanel; c += kTileColumns) {
        Tile tile = {};
        subtract_products(tile, other, scaled_ + c, n_players);
        for (int64_t r = 0; r < kTileRows; ++r) {
          for (int64_t v = 0; v < kTileVectors; ++v) tile[r][v] *= 1.0 + tile[r][v] * tile[r][v];
        }
        subtract_products(tile, other + n_players * kPanel, scaled_ + n_players * kPanel + c, a_.n_sizes);
        store_tile(out + i * kPanel + c, tile);
      }
    }
    for (int64_t i = j; i < j + kPanel; ++i) {
      out[i * kPanel + i - j] += i < a_.n_rows ? a_.diagonal[output * a_.n_rows + i] : 1.0;
    }
  }

  // Solves L X = B in place of B for rows [first, last) of a panel, where B is zero above.
  void substitute(double* x, int64_t first, int64_t last) const {
    for (int64_t i = first; i < last; i += kTileRows) {
      const double* u = factor_column(i);
      for (int64_t c = 0; c < kPanel; c += kTileColumns) {
        Tile tile;
        load_tile(tile, x + i * kPanel + c);
        subtract_products(tile, u + first * kPanel, x + first * kPanel + c, i - first);
#pragma GCC unroll 8
        for (int64_t r = 0; r < kTileRows; ++r) {
          for (int64_t v = 0; v < kTileVectors; ++v) tile[r][v] *= reciprocals_[i + r];
#pragma GCC unroll 8
          for (int64_t s = r + 1; s < kTileRows; ++s) {
            for (int64_t v = 0; v < kTileVectors; ++v) tile[s][v] -= u[(i + r) * kPanel + s] * tile[r][v];
          }
        }
        store_tile(x + i * kPanel + c, tile);
      }
    }
  }

  // Solves U X = B in place of B for a panel, products in falling order.
  void substitute_back(double* x) const {
    for (int64_t i = rows_ - kTileRows; i >= 0; i -= kTileRows) {
      for (int64_t c = 0; c < kPanel; c += kTileColumns) {
        Tile tile;
        load_tile(tile, x + i * kPanel + c);
        for (int64_t j = rows_ - kPanel; j >= i - i % kPanel; j -= kPanel) {
          const double* u = factor_panel(j) + i * kPanel;
          for (int64_t k = kPanel - 1; k >= 0 && j + k >= i + kTileRows; --k) {
            subtract_product(tile, u + k, kPanel, x + (j + k) * kPanel + c);
          }
        }
        const double* u = factor_column(i) + i * kPanel;
#pragma GCC unroll 8
        for (int64_t r = kTileRows - 1; r >= 0; --r) {
          for (int64_t v = 0; v < kTileVectors; ++v) tile[r][v] *= reciprocals_[i + r];
#pragma GCC unroll 8
          for (int64_t s = 0; s < r; ++s) {
            for (int64_t v = 0; v < kTileVectors; ++v) tile[s][v] -= u[s * kPanel + r] * tile[r][v];
          }
        }
        store_tile(x + i * kPanel + c, tile);
      }
    }
  }

  // Factorises the diagonal block of a panel whose rows above it are done. Returns 0 or the failing row, from 1.
  int64_t factorise_diagonal(int64_t j, double* log_determinant) {
    double* x = factor_panel(j);
    for (int64_t i = j; i < j + kPanel; i += kTileRows) {
      for (int64_t c = 0; c < kPanel; c += kTileColumns) {
        Tile tile;
        load_tile(tile, x + i * kPanel + c);
        subtract_products(tile, x + i - j, x + c, i);
        store_tile(x + i * kPanel + c, tile);
      }
      for (int64_t r = i; r < i + kTileRows; ++r) {
        double* row = x + r * kPanel;
        const double pivot = row[r - j];
        if (!(pivot > 0.0 && pivot < INFINITY)) return r + 1;
        *log_determinant += log(pivot);
        const double reciprocal = reciprocals_[r] = 1.0 / __builtin_sqrt(pivot);
        for (int64_t c = 0; c < kPanel; ++c) row[c] *= reciprocal;
        for (int64_t s = r + 1; s < i + kTileRows; ++s) {
          for (int64_t c = 0; c < kPanel; ++c) x[s * kPanel + c] -= row[s - j] * row[c];
        }
      }
    }
    return 0;
  }

  // Rows [j, j + kPanel) of L z = y.
  void substitute_output(const double* y, int64_t j) {
    const double* u = factor_panel(j);
    double* z = solution_ + j;
    for (int64_t c = 0; c < kPanel; ++c) z[c] = j + c < a_.n_rows ? y[j + c] : 0.0;
    Vector sums[kPanel / kLanes];
    for (int64_t v = 0; v < kPanel / kLanes; ++v) sums[v] = load(z + v * kLanes);
    for (int64_t k = 0; k < j; ++k) {
      for (int64_t v = 0; v < kPanel / kLanes; ++v) sums[v] -= solution_[k] * load(u + k * kPanel + v * kLanes);
    }
    for (int64_t v = 0; v < kPanel / kLanes; ++v) store(z + v * kLanes, sums[v]);
    for (int64_t r = 0; r < kPanel; ++r) {
      z[r] *= reciprocals_[j + r];
      for (int64_t c = r + 1; c < kPanel; ++c) z[c] -= u[(j + r) * kPanel + c] * z[r];
    }
  }

  // U alpha = z in place of z. Products of a row are summed lane by lane, then over the lanes.
  void substitute_output_back() {
    memset(panel_, 0, rows_ * kPanel * sizeof(double));
    for (int64_t j = rows_ - kPanel; j >= 0; j -= kPanel) {
      const double* u = factor_panel(j);
      double* z = solution_ + j;
      for (int64_t r = kPanel - 1; r >= 0; --r) {
        double rest = z[r] - sum_lanes(panel_ + (j + r) * kPanel);
        for (int64_t c = r + 1; c < kPanel; ++c) rest -= u[(j + r) * kPanel + c] * z[c];
        z[r] = rest * reciprocals_[j + r];
      }
      for (int64_t i = 0; i < j; ++i) {
        for (int64_t c = 0; c < kPanel; ++c) panel_[i * kPanel + c] += u[i * kPanel + c] * z[c];
      }
    }
  }

  // Sums of squares down the columns of L^-1, made panel by panel.
  void invert_diagonal(double* out) {
    for (int64_t j = 0; j < rows_; j += kPanel) {
      memset(panel_ + j * kPanel, 0, (rows_ - j) * kPanel * sizeof(double));
      for (int64_t i = j; i < j + kPanel; ++i) panel_[i * kPanel + i - j] = 1.0;
      substitute(panel_, j, rows_);
      double sums[kPanel] = {};
      for (int64_t i = j; i < rows_; ++i) {
        for (int64_t c = 0; c < kPanel; ++c) sums[c] += panel_[i * kPanel + c] * panel_[i * kPanel + c];
      }
      for (int64_t c = 0; c < kPanel && j + c < a_.n_rows; ++c) out[j + c] = sums[c];
    }
  }

  // Means of p * (V^-1 p).
  void probe_diagonal(double* out) {
    for (int64_t i = 0; i < a_.n_rows; ++i) out[i] = 0.0;
    for (int64_t p = 0; p < a_.n_probes; p += kPanel) {
      const double* probes = probes_ + p * a_.n_rows;
      memcpy(panel_, probes, a_.n_rows * kPanel * sizeof(double));
      memset(panel_ + a_.n_rows * kPanel, 0, (rows_ - a_.n_rows) * kPanel * sizeof(double));
      substitute(panel_, 0, rows_);
      substitute_back(panel_);
      for (int64_t i = 0; i < a_.n_rows; ++i) {
        double products[kPanel];
        for (int64_t c = 0; c < kPanel; ++c) products[c] = probes[i * kPanel + c] * panel_[i * kPanel + c];
        out[i] += sum_lanes(products);
      }
    }
    for (int64_t i = 0; i < a_.n_rows; ++i) out[i] /= static_cast<double>(a_.n_probes);
  }

  const CubicRegression& a_;
  const double* columns_;  // packed
  const double* probes_;   // packed
  const int64_t rows_;
  double* factor_;
  double* panel_;        // [rows, kPanel]
  double* scaled_;       // [M + Q, kPanel]
  double* reciprocals_;  // [rows], of U's diagonal
  double* solution_;     // [rows]
};

double* allocate(int64_t n) { return static_cast<double*>(aligned_alloc(64, padded(n) * sizeof(double))); }

}  // namespace

Status cubic_regression(const CubicRegression& a) {
  const int64_t n_columns = a.n_players + a.n_sizes, rows = padded(a.n_rows);
  double* packed = allocate(rows * n_columns + a.n_rows * padded(a.n_probes));
  if (packed == nullptr) return Status::kNoMemory;
  double* probes = packed + rows * n_columns;
  pack_rows(packed, a.columns, a.n_rows, n_columns);
  pack_rows(probes, a.probes, a.n_probes, a.n_rows);
  bool done = true;
  const int64_t n_threads = a.n_threads < a.n_outputs ? a.n_threads : a.n_outputs;
#pragma omp parallel num_threads(n_threads)
  {
    double* work = allocate(Regression::work_size(a));
    if (work == nullptr) {
#pragma omp atomic write
      done = false;
    }
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < a.n_outputs; ++b) {
      if (work != nullptr) Regression(a, packed, probes, work).run(b);
    }
    free(work);
  }
  free(packed);
  return done ? Status::kOk : Status::kNoMemory;
}

}  // namespace xaifast::XAIFAST_ISA
