#pragma once

namespace xaifast {

// What a kernel reports to its binding; kernels throw nothing.
enum class Status { kOk, kNoMemory };

}  // namespace xaifast
