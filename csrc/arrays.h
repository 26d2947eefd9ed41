// Arrays of numbers, as the CPU and the CUDA side both read and write them: costs, traces, rewards.
#pragma once

#include <cstdint>

#include "token_state.h"  // CMDP_HD, CMDP_ISA

namespace cmdp {
inline namespace CMDP_ISA {

// An array of numbers: float64 if `wide`, else float32.
struct Numbers {
  void* data;
  bool wide;

  CMDP_HD double operator[](int64_t i) const {
    return wide ? static_cast<const double*>(data)[i] : static_cast<const float*>(data)[i];
  }
  // Returns the number as it was written, so that a scan that continues from it sees the rounded value.
  CMDP_HD double set(int64_t i, double value) const {
    if (!wide) return static_cast<float*>(data)[i] = static_cast<float>(value);
    return static_cast<double*>(data)[i] = value;
  }
  CMDP_HD double rounded(double value) const { return wide ? value : static_cast<float>(value); }
};

// The trace of every token, and per sequence the position of its first violation.
struct TraceArrays {
  Numbers cumulative, remaining, excess;  // [tokens]
  uint8_t* violated;                      // [tokens]
  int64_t* first_violation;               // [sequences]
};

// The task's reward and where the modified one goes, [tokens] each. Both null where no reward is wanted.
struct RewardArrays {
  Numbers task_reward, reward;

  CMDP_HD bool wanted() const { return reward.data != nullptr; }
};

}  // namespace CMDP_ISA
}  // namespace cmdp
