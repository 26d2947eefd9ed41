// The factor that kernels multiply logits by, and the small arithmetic that every backend has to do alike.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "token_state.h"  // CMDP_HD, CMDP_ISA

namespace cmdp {
inline namespace CMDP_ISA {

constexpr double kLn2 = 0.693147180559945309417232121458;
constexpr double kLog2e = 1.44269504088896340735992468100;

// log2(e)/temperature as the kernels multiply by it, and that same factor in natural units.
struct Scale {
  float per_octave;
  double natural;
};

static inline Scale scale_of(double temperature) {
  const float per_octave = static_cast<float>(kLog2e / temperature);
  return {per_octave, static_cast<double>(per_octave) * kLn2};
}

// A logit times the scale, rounded: the same number wherever it is computed, so that two of them cancel exactly.
// Without the barrier the product might be fused with a subtraction that follows.
CMDP_HD static inline double scaled(double logit, double scale) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(logit, scale);
#else
  double product = logit * scale;
  asm volatile("" : "+m"(product));
  return product;
#endif
}

// What takes raw logits to nats, in double: a factor, or what they are divided by, unless that is 0. Logits of float64
// are divided, as PyTorch does: 1/temperature is rounded, and 1e9 times that is off by 1e-7.
struct Natural {
  double factor, divisor;
};

CMDP_HD static inline double scaled(double logit, const Natural& scale) {
#ifndef __CUDA_ARCH__  // where no logit is a float64
  if (scale.divisor != 0) return logit / scale.divisor;
#endif
  return scaled(logit, scale.factor);
}

// Whether floats may be relative to a reference of so many octaves; false of a NaN. Below 2^24 octaves floats lie an
// octave apart: a larger reference may be rounded by more than that, and then even the maximum weighs anything or
// nothing.
CMDP_HD static inline bool is_reference(float octaves) { return std::fabs(octaves) < 1e7f; }

// isfinite that no compiler flag can fold away.
CMDP_HD static inline bool finite(double value) {
  return (std::bit_cast<uint64_t>(value) & 0x7ff0000000000000u) != 0x7ff0000000000000u;
}

}  // namespace CMDP_ISA
}  // namespace cmdp
