#pragma once

#include <cstdint>

namespace xaifast {

struct Philox4 {
  uint32_t lane[4];
};

struct PhiloxKey {
  uint32_t lane[2];
};

constexpr int64_t kPhiloxBlock = 8;  // calls made at once: numbers of calls are multiples of it

}  // namespace xaifast
