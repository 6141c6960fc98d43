#include "xaifast/occlude.h"

// Changes of a first layer's rows and what activations make of them, from one read of the update and of the base. The
// products in between belong to the caller.
namespace xaifast::XAIFAST_ISA {
namespace {

constexpr int64_t kParallelElements = int64_t{1} << 17;  // below, waking threads takes longer
constexpr int64_t kBlock = 64;                           // units between two looks at a verdict

template <typename T>
struct Exponential {  // of an argument cut off where 2^n would leave the normal numbers
  T power, minus_one;

  explicit Exponential(T x);
};

// e^x = 2^n (1 + p), p = e^r - 1 by its series with |r| <= log(2) / 2; so that e^x - 1 keeps its digits near 0.
template <typename T, typename Bits, int kTerms, int kMantissa>
void exponential(T x, T limit, T magic, T ln2_high, T ln2_low, T& power, T& minus_one) {
  x = x < -limit ? -limit : x > limit ? limit : x;
  const T shifted = x * T(1.4426950408889634) + magic;  // the integer n is in its lowest bits
  const T n = shifted - magic;
  const T r = (x - n * ln2_high) - n * ln2_low;
  T p = 1;
#pragma GCC unroll 16
  for (int k = kTerms; k > 1; --k) p = 1 + p * (r * (T(1) / T(k)));
  p *= r;
  Bits bits;
  __builtin_memcpy(&bits, &shifted, sizeof(T));
  bits = (bits << kMantissa) + (Bits((Bits(1) << (8 * sizeof(T) - 2 - kMantissa)) - 1) << kMantissa);
  T scale;
  __builtin_memcpy(&scale, &bits, sizeof(T));
  power = scale * p + scale;
  minus_one = scale * p + (scale - 1);
}

template <>
Exponential<float>::Exponential(float x) {
  exponential<float, uint32_t, 8, 23>(x, 80.0f, 12582912.0f, 0.693359375f, -2.12194440e-4f, power, minus_one);
}

template <>
Exponential<double>::Exponential(double x) {
  exponential<double, uint64_t, 14, 52>(x, 700.0, 6755399441055744.0, 6.93147180369123816490e-01,
                                        1.90821492927058770002e-10, power, minus_one);
}

template <typename T>
T relu_step(T z, T d) {
  return (d < z ? d : z) - (z < 0 ? z : T(0));
}

// Steps take the planes of a sample at unit h: base[h], base[width + h] and base[2 width + h].
template <typename T>
struct LinearStep {
  T operator()(const T*, int64_t, int64_t, T d) const { return d; }
};

template <typename T>
struct ReluStep {
  T operator()(const T* base, int64_t, int64_t h, T d) const { return relu_step(base[h], d); }
};

template <typename T>
struct LeakyStep {
  T slope;
  T operator()(const T* base, int64_t, int64_t h, T d) const { return (1 - slope) * relu_step(base[h], d) + slope * d; }
};

// sigmoid(z) - sigmoid(a) with a = z - d: sigmoid(z) sigmoid(-a) (1 - e^-d) for d > 0 and sigmoid(-z) sigmoid(a) (e^d -
// 1) else, whose factors lie in [0, 1] and lose no digits where d is small. tanh(z) = 2 sigmoid(2 z) - 1.
template <typename T>
struct SigmoidChange {
  T change, after;  // after = sigmoid(a)

  SigmoidChange(T z, T s, T q, T d) {
    const T a = z - d, t = Exponential<T>(a < 0 ? a : -a).power, tail = t / (1 + t), rest = 1 / (1 + t);
    const T rise = Exponential<T>(d < 0 ? d : -d).minus_one;
    const T falling = a < 0 ? rest : tail;  // sigmoid(-a)
    after = a < 0 ? tail : rest;
    change = (d > 0 ? -s * falling : q * after) * rise;
  }
};

template <typename T>
struct SigmoidStep {
  T scale;  // 1, or 2 for tanh
  T operator()(const T* base, int64_t width, int64_t h, T d) const {
    return scale * SigmoidChange<T>(scale * base[h], base[width + h], base[2 * width + h], scale * d).change;
  }
};

// z sigmoid(z) - a sigmoid(a) = z (sigmoid(z) - sigmoid(a)) + d sigmoid(a).
template <typename T>
struct SiluStep {
  T operator()(const T* base, int64_t width, int64_t h, T d) const {
    const SigmoidChange<T> c(base[h], base[width + h], base[2 * width + h], d);
    return base[h] * c.change + d * c.after;
  }
};

// The elements that move with a row.
template <typename T>
struct Player {
  const T* x;             // [N] of the sample
  const int64_t* member;  // [count]
  int64_t count;

  Player(const OccludeRows& a, int64_t b, int64_t m, const int64_t* itself) {
    x = static_cast<const T*>(a.x) + b * a.n_elements;
    if (a.order == nullptr) {
      member = itself, count = 1;
      return;
    }
    const int64_t* offsets = a.offsets + (a.order_per_input ? b * (a.n_players + 1) : 0) + m;
    member = a.order + (a.order_per_input ? b * a.n_elements : 0) + offsets[0];
    count = offsets[1] - offsets[0];
  }

  // Units [h, h + n) of d; products are added in the order of the elements.
  void change(const T* columns, int64_t width, int64_t h, int64_t n, T* __restrict__ d) const {
    for (int64_t j = 0; j < n; ++j) d[j] = 0;
    for (int64_t k = 0; k < count; ++k) {
      const T value = x[member[k]];
      if (value == 0) continue;
      const T* column = columns + member[k] * width + h;
      for (int64_t j = 0; j < n; ++j) d[j] += value * column[j];
    }
  }
};

template <typename T, typename F>
void first_rows(const OccludeRows& a, int64_t planes, T* out, F step) {
  const T *columns = static_cast<const T*>(a.columns), *base = static_cast<const T*>(a.base);
  const int64_t width = a.width;
  const bool parallel = (a.stop - a.start) * width >= kParallelElements;
#pragma omp parallel for schedule(static) num_threads(a.n_threads) if (parallel)
  for (int64_t r = a.start; r < a.stop; ++r) {
    const int64_t b = a.rows[r] / a.n_players, m = a.rows[r] % a.n_players;
    const Player<T> player(a, b, m, &m);
    const T* z = base + b * planes * width;
    T* __restrict__ d = out + (r - a.start) * width;
    if (player.count == 1) {
      const T value = player.x[*player.member];
      const T* column = columns + *player.member * width;
      for (int64_t h = 0; h < width; ++h) d[h] = step(z, width, h, value * column[h]);
    } else {
      player.change(columns, width, 0, width, d);
      for (int64_t h = 0; h < width; ++h) d[h] = step(z, width, h, d[h]);
    }
  }
}

template <typename T, typename F>
void later_rows(const OccludeRows& a, int64_t planes, T* tile, F step) {
  const T* base = static_cast<const T*>(a.base);
  const int64_t width = a.width;
  const bool parallel = (a.stop - a.start) * width >= kParallelElements;
#pragma omp parallel for schedule(static) num_threads(a.n_threads) if (parallel)
  for (int64_t r = a.start; r < a.stop; ++r) {
    const T* z = base + a.rows[r] / a.n_players * planes * width;
    T* __restrict__ d = tile + (r - a.start) * width;
    for (int64_t h = 0; h < width; ++h) d[h] = step(z, width, h, d[h]);
  }
}

template <typename T>
void step_rows(const OccludeRows& a, T* tile, bool first, Step step, double slope) {
  const auto run = [&](int64_t planes, auto f) {
    first ? first_rows<T>(a, planes, tile, f) : later_rows<T>(a, planes, tile, f);
  };
  switch (step) {
    case Step::kLinear:
      return run(1, LinearStep<T>{});
    case Step::kRelu:
      return run(1, ReluStep<T>{});
    case Step::kLeaky:
      return run(1, LeakyStep<T>{static_cast<T>(slope)});
    case Step::kSigmoid:
      return run(3, SigmoidStep<T>{1});
    case Step::kTanh:
      return run(3, SigmoidStep<T>{2});
    case Step::kSilu:
      return run(3, SiluStep<T>{});
  }
}

template <typename T>
bool keeps_signs(const T* z, const T* d, T factor, int64_t n) {
  int changed = 0;
  for (int64_t j = 0; j < n; ++j) {
    const T change = factor * d[j];
    changed |= z[j] > 0 ? change > z[j] : change < z[j];
  }
  return changed == 0;
}

template <typename T>
bool certify_row(const OccludeRows& a, const OccludeBounds& bounds, int64_t b, int64_t m) {
  const Player<T> player(a, b, m, &m);
  const T *columns = static_cast<const T*>(a.columns), *z = static_cast<const T*>(a.base) + b * a.width;
  T largest = 0, norm = 0;
  for (int64_t k = 0; k < player.count; ++k) {
    const int64_t i = player.member[k];
    const T x = player.x[i] < 0 ? -player.x[i] : player.x[i];
    largest += x * static_cast<const T*>(bounds.largest)[i];
    norm += x * static_cast<const T*>(bounds.norms)[i];
  }
  const T radius = static_cast<const T*>(bounds.radius)[b];
  const bool near = norm < radius;
  if (near && largest < static_cast<const T*>(bounds.nearest)[b]) return true;
  if (!near && player.count == 1) return false;
  T squares = 0;
  for (int64_t h = 0; h < a.width; h += kBlock) {
    const int64_t n = h + kBlock < a.width ? kBlock : a.width - h;
    if (player.count == 1) {
      if (!keeps_signs(z + h, columns + *player.member * a.width + h, player.x[*player.member], n)) return false;
      continue;
    }
    T d[kBlock];
    player.change(columns, a.width, h, n, d);
    if (!keeps_signs(z + h, d, T(1), n)) return false;
    for (int64_t j = 0; j < n; ++j) squares += d[j] * d[j];
  }
  return near || squares < radius * radius;
}

template <typename T>
void certify_rows(const OccludeRows& a, const OccludeBounds& bounds, uint8_t* certified) {
  const bool parallel = (a.stop - a.start) * a.width >= kParallelElements;
#pragma omp parallel for schedule(static) num_threads(a.n_threads) if (parallel)
  for (int64_t r = a.start; r < a.stop; ++r) {
    certified[r - a.start] = certify_row<T>(a, bounds, a.rows[r] / a.n_players, a.rows[r] % a.n_players);
  }
}

}  // namespace

void occlude_step(const OccludeRows& a, void* tile, bool first, Step step, double slope) {
  if (a.is_double) return step_rows(a, static_cast<double*>(tile), first, step, slope);
  step_rows(a, static_cast<float*>(tile), first, step, slope);
}

void occlude_certify(const OccludeRows& a, const OccludeBounds& bounds, uint8_t* certified) {
  a.is_double ? certify_rows<double>(a, bounds, certified) : certify_rows<float>(a, bounds, certified);
}

}  // namespace xaifast::XAIFAST_ISA
