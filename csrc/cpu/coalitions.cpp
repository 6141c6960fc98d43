#include "xaifast/coalitions.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "distinct.h"
#include "random_stream.h"

// Equal, bit for bit, to xaifast/reference/coalitions.py, which explains the steps; doubles are added in its order.
namespace xaifast {
namespace {

constexpr int64_t kMaxPlayers = 4096;
constexpr int64_t kSaturated = int64_t{1} << 62;  // a class of so many coalitions or more is never exhausted
constexpr int64_t kRanked = int64_t{1} << 31;     // classes up to this size are drawn by rank
constexpr size_t kGroup = 4;                      // neighbouring sizes one of which stands for all in a grouped design

struct SizeClass {
  int64_t k;
  int64_t capacity;  // pairs there are
  double law;
  double expected;  // pairs
  int64_t drawn;    // pairs
};

// C(n, k) as far as it is below 2^63, else anything not below.
unsigned __int128 next_binomial(unsigned __int128 previous /* C(n, k - 1) */, int64_t n, int64_t k) {
  return previous >> 63 ? previous : previous * static_cast<uint64_t>(n - k + 1) / static_cast<uint64_t>(k);
}

// Gives all pairs of neighbouring classes to one of them, chosen in proportion to what they expect.
void gather_group(SizeClass** first, SizeClass** last, double uniform) {
  double total = 0.0;
  for (SizeClass** size = first; size != last; ++size) total += (*size)->expected;
  int64_t pairs = 0;
  for (SizeClass** size = first; size != last; ++size) {
    if ((*size)->capacity < static_cast<int64_t>(std::ceil(total)) + 1) return;
    pairs += (*size)->drawn;
  }
  for (SizeClass** size = first; size != last; ++size) (*size)->drawn = 0;
  SizeClass** chosen = first;
  for (double sum = (*chosen)->expected; chosen != last - 1 && uniform * total >= sum; sum += (*chosen)->expected)
    ++chosen;
  (*chosen)->drawn = pairs;
}

std::vector<SizeClass> size_classes(const Kernels& kernels, int64_t n_players, int64_t n_pairs, Design design,
                                    uint64_t seed) {
  std::vector<SizeClass> classes;
  unsigned __int128 binomial = 1;
  for (int64_t k = 1; k <= n_players / 2; ++k) {
    binomial = next_binomial(binomial, n_players, k);
    const bool middle = 2 * k == n_players;
    const auto capacity = std::min<unsigned __int128>(binomial >> middle, kSaturated);
    double law = middle ? 0.5 : 1.0;
    if (design == Design::kKernel) law /= static_cast<double>(k * (n_players - k));
    classes.push_back({k, static_cast<int64_t>(capacity), law, -1.0, 0});
  }

  std::vector<SizeClass*> open;
  for (SizeClass& size : classes) open.push_back(&size);
  int64_t left = n_pairs;
  double level = 0.0;
  while (!open.empty()) {
    double total = 0.0;
    for (const SizeClass* size : open) total += size->law;
    level = static_cast<double>(left) / total;
    std::vector<SizeClass*> still_open;
    for (SizeClass* size : open) {
      if (static_cast<double>(size->capacity) <= level * size->law + 1e-6) {
        size->expected = static_cast<double>(size->capacity);
        size->drawn = size->capacity;
        left -= size->capacity;
      } else {
        still_open.push_back(size);
      }
    }
    if (still_open.size() == open.size()) break;
    open.swap(still_open);
  }

  Stream stream(kernels, seed, 0, Domain::kRounding);
  const double uniform = stream.unit();
  double sum_before = 0.0;
  for (SizeClass* size : open) {
    size->expected = level * size->law;
    const double sum_here = size == open.back() ? static_cast<double>(left) : sum_before + size->expected;
    size->drawn = static_cast<int64_t>(std::floor(sum_here + uniform) - std::floor(sum_before + uniform));
    sum_before = sum_here;
  }
  if (design == Design::kGrouped) {
    for (size_t first = 0; first < open.size(); first += kGroup) {
      gather_group(open.data() + first, open.data() + std::min(first + kGroup, open.size()), stream.unit());
    }
  }
  return classes;
}

void add_player(int64_t* bits, int64_t player) {
  bits[player >> 6] = static_cast<int64_t>(static_cast<uint64_t>(bits[player >> 6]) | uint64_t{1} << (player & 63));
}

// C(r, j) for r < n and j < k: the subsets that begin with a player, once it is taken.
class Binomials {
 public:
  Binomials(int64_t n, int64_t k) : k_(k), table_(n * k) {
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t j = 0; j < k; ++j) table_[r * k + j] = j == 0 ? 1 : r == 0 ? 0 : of(r - 1, j - 1) + of(r - 1, j);
    }
  }
  int64_t of(int64_t r, int64_t j) const { return table_[r * k_ + j]; }

 private:
  int64_t k_;
  std::vector<int64_t> table_;
};

// Adds to `bits` the k-subset of n players that has this rank in lexicographic order.
void add_ranked(int64_t* bits, int64_t first_player, int64_t n, int64_t k, int64_t rank, const Binomials& binomials) {
  for (int64_t rest = n - 1; k > 0; --rest) {
    const int64_t starting_here = binomials.of(rest, k - 1);
    if (rank < starting_here) {
      add_player(bits, first_player + n - 1 - rest);
      --k;
    } else {
      rank -= starting_here;
    }
  }
}

// Calls use(j, t), t uniform in [0, j], for j = first...stop - 1.
template <typename Use>
void for_each_draw(Stream& stream, int64_t first, int64_t stop, Use use) {
  for (int64_t j = first; j < stop;) {
    const Words words = stream.take(stop - j);
    for (int64_t i = 0; i < words.count; ++i, ++j) use(j, below(words.data[i], j + 1));
  }
}

// Marks k distinct of n players by Floyd's method; none is marked yet. A byte a player and no branch: whether t is
// taken is read and written on without waiting for what was written last.
void mark_random(uint8_t* present /* [n] */, int64_t n, int64_t k, Stream& stream) {
  for_each_draw(stream, n - k, n, [present](int64_t j, int64_t t) {
    present[j] = present[t];  // t may be j, which is not marked
    present[t] = 1;
  });
}

std::vector<int64_t> random_ranks(int64_t capacity, int64_t count, Stream& stream) {
  std::vector<int64_t> ranks;
  ranks.reserve(count);
  Distinct taken(count);
  for_each_draw(stream, capacity - count, capacity, [&](int64_t j, int64_t t) {
    for (const int64_t rank : {t, j}) {
      const auto same = [&](int64_t other) { return ranks[other] == rank; };
      if (!taken.add(static_cast<int64_t>(ranks.size()), mix(0, rank), same)) continue;
      ranks.push_back(rank);
      break;
    }
  });
  return ranks;
}

class Sampler {
 public:
  Sampler(const Kernels& kernels, int64_t n_players, int64_t n_samples, uint64_t seed, uint64_t block, int64_t* bits,
          double* weights)
      : kernels_(kernels),
        m_(n_players),
        words_((n_players + 63) / 64),
        n_pairs_((n_samples - 2) / 2),
        seed_(seed),
        block_(block),
        bits_(bits),
        weights_(weights),
        present_(64 * words_) {
    std::fill(bits_, bits_ + n_samples * words_, 0);
    for (int64_t player = 0; player < m_; ++player) add_player(bits_, player);
    weights_[0] = weights_[1] = std::numeric_limits<double>::infinity();
  }

  void by_size(Design design) {
    const std::vector<SizeClass> classes = size_classes(kernels_, m_, n_pairs_, design, seed_);
    std::vector<double> raw;
    double total = 0.0;
    for (const SizeClass& size : classes) {
      const double mass = 2 * size.k == m_ ? 0.5 : 1.0;
      raw.push_back(mass / (static_cast<double>(size.k * (m_ - size.k)) * size.expected));
      total += static_cast<double>(size.drawn) * raw.back();
    }
    const double scale = static_cast<double>(n_pairs_) / total;
    int64_t pair = 0;
    for (size_t i = 0; i < classes.size(); ++i) {
      draw_class(classes[i], pair);
      for (const int64_t end = pair + classes[i].drawn; pair < end; ++pair) finish_pair(pair, raw[i] * scale);
    }
  }

  void by_chains() {
    const int64_t steps = m_ - 1;
    std::vector<int64_t> sizes;
    for (int64_t j = 0; j < std::min(n_pairs_, steps); ++j) {
      sizes.push_back(n_pairs_ < steps ? 1 + (2 * j + 1) * steps / (2 * n_pairs_) : j + 1);
    }
    std::vector<int64_t> order(m_);
    int64_t pair = 0;
    for (int64_t chain = 0; pair < n_pairs_; ++chain) {
      Stream stream(kernels_, seed_, block_, Domain::kChains, static_cast<uint32_t>(chain));
      std::iota(order.begin(), order.end(), 0);
      for (int64_t i = m_ - 1; i > 0;) {
        const Words words = stream.take(i);
        for (int64_t w = 0; w < words.count; ++w, --i) std::swap(order[i], order[below(words.data[w], i + 1)]);
      }
      for (const int64_t size : sizes) {
        for (int64_t i = 0; i < size; ++i) add_player(row(pair), order[i]);
        finish_pair(pair++, 1.0);
      }
    }
  }

 private:
  int64_t* row(int64_t pair) { return bits_ + (2 + 2 * pair) * words_; }

  // Draws the subsets T of one class into the rows of pairs first_pair...
  void draw_class(const SizeClass& size, int64_t first_pair) {
    const int64_t fixed = 2 * size.k == m_;  // in the middle class player 0 is in T
    const int64_t n = m_ - fixed, k = size.k - fixed;
    const bool complete = size.drawn == size.capacity;
    const bool ranked = complete || size.capacity <= kRanked;
    std::vector<int64_t> ranks;
    if (ranked && !complete) {
      Stream stream(kernels_, seed_, block_, Domain::kRanks, static_cast<uint32_t>(size.k));
      ranks = random_ranks(size.capacity, size.drawn, stream);
    }
    const Binomials binomials(ranked ? n : 0, k);
    Distinct seen(ranked ? 0 : size.drawn);
    for (int64_t i = 0; i < size.drawn; ++i) {
      int64_t* bits = row(first_pair + i);
      if (ranked) {
        if (fixed) add_player(bits, 0);
        add_ranked(bits, fixed, n, k, complete ? i : ranks[i], binomials);
        continue;
      }
      const auto same = [&](int64_t other) { return std::equal(bits, bits + words_, row(other)); };
      uint32_t attempt = 0;
      do {
        draw_row(bits, fixed, n, k, static_cast<uint32_t>(first_pair + i), attempt++);
      } while (!seen.add(first_pair + i, std::accumulate(bits, bits + words_, uint64_t{0}, mix), same));
    }
  }

  // Draws k of n players into a row, beside the fixed ones before them.
  void draw_row(int64_t* bits, int64_t fixed, int64_t n, int64_t k, uint32_t pair, uint32_t attempt) {
    std::memset(present_.data(), 0, present_.size());
    std::memset(present_.data(), 1, fixed);
    Stream stream(kernels_, seed_, block_, Domain::kSubsets, pair, attempt);
    mark_random(present_.data() + fixed, n, k, stream);
    kernels_.pack_bits(bits, present_.data(), 1, 64 * words_);
  }

  void finish_pair(int64_t pair, double weight) {
    int64_t* bits = row(pair);
    for (int64_t w = 0; w < words_; ++w) bits[words_ + w] = bits_[w] & ~bits[w];
    weights_[2 + 2 * pair] = weights_[3 + 2 * pair] = weight;
  }

  const Kernels& kernels_;
  int64_t m_, words_, n_pairs_;
  uint64_t seed_, block_;
  int64_t* bits_;
  double* weights_;
  std::vector<uint8_t> present_;  // [64 W], players of one row
};

}  // namespace

const char* sample_coalitions(const Kernels& kernels, int64_t n_players, int64_t n_samples, Design design,
                              uint64_t seed, uint64_t block, int64_t* bits, double* weights) {
  if (n_players < 1 || n_players > kMaxPlayers) return "sample_coalitions: n_players must be between 1 and 4096";
  const bool all = n_players < 63 && n_samples == int64_t{1} << n_players;
  const bool too_many = n_players < 63 && n_samples > int64_t{1} << n_players;
  if (n_samples % 2 != 0 || n_samples < (n_players == 1 ? 2 : 4) || too_many) {
    return "sample_coalitions: n_samples must be the even row count that design_size gives";
  }
  Sampler sampler(kernels, n_players, n_samples, seed, block, bits, weights);
  if (n_players == 1) return nullptr;
  if (design == Design::kChain && !all) {
    const int64_t pairs = (n_samples - 2) / 2, steps = n_players - 1;
    if (pairs > steps && pairs % steps != 0) {
      return "sample_coalitions: a chain design must have the row count that design_size gives";
    }
    sampler.by_chains();
  } else {
    sampler.by_size(design);
  }
  return nullptr;
}

}  // namespace xaifast
