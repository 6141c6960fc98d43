#pragma once

#include <cstdint>

#include "bytes.h"
#include "xaifast/bits.h"

// Coalitions as byte masks: 0xFF for the bytes of a present entry, 0x00 for those of an absent one. Included by sources
// that are compiled once per instruction set, hence the namespaces.
namespace xaifast::XAIFAST_ISA {
namespace {

constexpr int64_t kTablePlayers = 4096;  // up to so many, states are looked up in a table of bytes
constexpr int64_t kMaskExcess = 64 * 8;  // bytes that LaneMask::expand may write beyond the mask

// Lanes of all ones or zeros for the 64 bits of a word, up to eight at a time: each lane tests its own bit.
template <typename T>
void expand_word(uint8_t* lanes /* [64] of T */, uint64_t word) {
  constexpr int kLanes = kVectorBytes / sizeof(T) < 8 ? kVectorBytes / sizeof(T) : 8;
  typedef T Lanes __attribute__((vector_size(kLanes * sizeof(T))));
  Lanes powers;
  for (int k = 0; k < kLanes; ++k) powers[k] = static_cast<T>(1 << k);
  for (int i = 0; i < 64; i += kLanes, lanes += sizeof(Lanes)) {
    const T part = static_cast<T>(word >> i);  // named: GCC 12 under -fsanitize=undefined sees an int in the expression
    const auto there = (powers & part) == powers;
    __builtin_memcpy(lanes, &there, sizeof(Lanes));
  }
}

// The mask of n consecutive players from `player` on, rounded up to whole words.
template <typename T>
void expand_players(uint8_t* mask, const int64_t* bits, int64_t words, int64_t player, int64_t n) {
  for (int64_t i = 0; i < n; i += 64, player += 64) {
    const int64_t w = player >> 6;
    const int shift = player & 63;
    uint64_t word = static_cast<uint64_t>(bits[w]) >> shift;
    if (shift != 0 && w + 1 < words) word |= static_cast<uint64_t>(bits[w + 1]) << (64 - shift);
    expand_word<T>(mask + i * sizeof(T), word);
  }
}

// State of any player: -1 present, 0 absent.
struct States {
  const int64_t* bits;  // [W]
  int64_t words;
  const int8_t* table;  // [1 + 64 W], players from -1 on, or null
  int64_t of(int32_t player) const {
    return table ? table[player + 1] : -static_cast<int64_t>(is_present(bits, words, player));
  }
};

// Where the states of the entries of a player map are read.
enum class Lookup {
  kStretch,  // entry p belongs to player first + p throughout: the mask is a stretch of the bits
  kTable,    // every player is in the table of states
  kBits,     // too many players for a table, or players beyond the words
};

Lookup choose_lookup(const int32_t* index, int64_t n, int64_t words) {
  const int64_t first = index[0];
  int64_t jumps = first < 0, strangers = 0;
  for (int64_t p = 0; p < n; ++p) {
    jumps += index[p] != first + p;
    strangers += index[p] < -1 || index[p] >= 64 * words;
  }
  if (strangers != 0) return Lookup::kBits;
  if (jumps == 0) return Lookup::kStretch;
  return words * 64 <= kTablePlayers ? Lookup::kTable : Lookup::kBits;
}

template <typename T>
void expand_lanes(uint8_t* mask, const States& states, const int32_t* index, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(mask + i * sizeof(T), static_cast<T>(states.of(index[i])));
}

// The masks of one coalition.
class LaneMask {
 public:
  LaneMask(const int64_t* bits, int64_t words, int64_t entry_bytes, Lookup lookup)
      : states_{bits, words, nullptr}, entry_bytes_(entry_bytes), lookup_(lookup) {
    if (lookup == Lookup::kTable) {
      table_[0] = -1;
      expand_players<uint8_t>(reinterpret_cast<uint8_t*>(table_) + 1, bits, words, 0, words * 64);
      states_.table = table_;
    }
  }

  // Entries index[0..n); may write kMaskExcess bytes more.
  void expand(uint8_t* mask, const int32_t* index, int64_t n) const {
    switch (entry_bytes_) {
      case 1:
        return expand_as<uint8_t>(mask, index, n);
      case 2:
        return expand_as<uint16_t>(mask, index, n);
      case 4:
        return expand_as<uint32_t>(mask, index, n);
      case 8:
        return expand_as<uint64_t>(mask, index, n);
    }
    // Whole words are stored; the next entry overwrites the excess.
    alignas(64) int8_t states[64];
    for (int64_t i = 0; i < n; i += 64) {
      const int64_t part = n - i < 64 ? n - i : 64;
      expand_as<uint8_t>(reinterpret_cast<uint8_t*>(states), index + i, part);
      for (int64_t k = 0; k < part; ++k, mask += entry_bytes_) {
        for (int64_t at = 0; at < entry_bytes_; at += 8) store<int64_t>(mask + at, states[k]);
      }
    }
  }

  const States& states() const { return states_; }

 private:
  template <typename T>
  void expand_as(uint8_t* mask, const int32_t* index, int64_t n) const {
    if (lookup_ == Lookup::kStretch) {
      expand_players<T>(mask, states_.bits, states_.words, index[0], n);
    } else {
      expand_lanes<T>(mask, states_, index, n);
    }
  }

  States states_;
  int64_t entry_bytes_;
  Lookup lookup_;
  int8_t table_[1 + kTablePlayers];
};

}  // namespace
}  // namespace xaifast::XAIFAST_ISA
