// The numbers that the forward pass saves of a row for the backward pass, and the gradient: one expression per column
// for the four upstream gradients g_l, g_H, g_R, g_F (method: the table of gradients in cmdp_fast/reference.py):
//
//   dx = [ g_l (1[v=a] - p) - g_H p (log p + H) + g_R p (log p - log w - R) + g_F (p - w) ] / temperature.
//
// In powers of two, with t = L x - M and s = L y - N where M, N are the normalisers rounded to float and r, q the rest
// that the rounding left, p = 2^t 2^-r and w = 2^s 2^-q. All constants of the row fold into a few coefficients:
//
//   dx = 2^t (constant + per_t t + per_difference ((t - s) - center)) - per_w 2^s,      center = R in octaves.
//
// Splitting the normalisers keeps p to a rounding error although L x may be large. t - s is taken as a difference, so
// that nearly equal models do not cancel, and R comes off it at once, so that models far apart do not either. The
// token's own column is done apart, in double. Header-only, free of any framework, like token_state.h.
#pragma once

#include "logits.h"
#include "scale.h"
#include "token_state.h"

namespace cmdp {
inline namespace CMDP_ISA {

CMDP_HD static inline SavedRow saved_row(const TokenState& state, const TokenStats& stats, bool exact) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const bool valid = state.valid();
  return {
      valid ? state.m : nan,
      valid ? state.n : nan,
      valid ? std::log(state.z) : nan,
      valid ? std::log(state.u) : nan,
      stats.entropy,
      stats.reverse_kl,
      exact ? 1.0 : 0.0,
  };
}

// The normalisers of a row as the forward pass saved them, and in octaves: a float, and the rest that its rounding
// left.
struct RowNormalizers {
  double m_exact, n_exact, log_z, log_u;
  float m, n;
  double r, q;

  CMDP_HD explicit RowNormalizers(const SavedRow& saved)
      : m_exact(saved.m), n_exact(saved.n), log_z(saved.log_z), log_u(saved.log_u) {
    const double lx = (m_exact + log_z) * kLog2e, ly = (n_exact + log_u) * kLog2e;
    m = static_cast<float>(lx), n = static_cast<float>(ly);
    r = lx - m, q = ly - n;
  }
  CMDP_HD double log_p(double x) const { return (x - m_exact) - log_z; }  // x scaled by 1/temperature
  CMDP_HD double log_w(double y) const { return (y - n_exact) - log_u; }
};

// The numbers that the gradient of a row's columns depends on, besides its normalisers.
struct RowGradient {
  double g_l, g_h, g_r, g_f;  // upstream; g_r is 0 where R is infinite: its true gradient is, and would poison the step
  double h, r;                // H and R
  Natural scale;              // 1/temperature, as the kernels multiply by it
};

// kTeacher: whether any upstream gradient needs the teacher's logits; without it g_r and g_f are taken to be 0.
template <bool kTeacher = true, class Real>
CMDP_HD static inline RowGradient row_gradient(const Upstream<Real>& upstream, int64_t row, const SavedRow& saved,
                                               const Natural& scale) {
  const auto at = [row](const Real* g) { return g != nullptr ? static_cast<double>(g[row]) : 0.0; };
  const double g_l = at(upstream.logprob), g_h = at(upstream.entropy);
  const double g_r = kTeacher ? at(upstream.reverse_kl) : 0.0, g_f = kTeacher ? at(upstream.forward_kl) : 0.0;
  const bool unbounded = saved.reverse_kl == TokenState::infinity();
  return {g_l, g_h, unbounded ? 0.0 : g_r, g_f, saved.entropy, unbounded ? 0.0 : saved.reverse_kl, scale};
}

// One column in double, x and y raw. Excluded columns have probability 0, and 0 * anything = 0.
CMDP_HD static inline double column_gradient(const RowGradient& g, const RowNormalizers& norm, double x, double y,
                                             bool own) {
  const double log_p = norm.log_p(scaled(x, g.scale)), log_w = norm.log_w(scaled(y, g.scale));
  const double p = std::exp(log_p);
  double sum = g.g_l * ((own ? 1.0 : 0.0) - p);
  if (g.g_f != 0) sum += g.g_f * (p - std::exp(log_w));
  if (p != 0) {
    if (g.g_h != 0) sum -= g.g_h * p * (log_p + g.h);
    if (g.g_r != 0) sum += g.g_r * p * (log_p - log_w - g.r);
  }
  return sum * g.scale.factor;
}

// Of the expression in powers of two above.
struct Coefficients {
  float constant, per_t, per_difference, per_w, center;
  bool modest;  // float arithmetic does not overflow on the way to a finite result
};

CMDP_HD static inline Coefficients coefficients_of(const RowGradient& g, const RowNormalizers& norm) {
  const double weight = g.scale.factor * std::exp2(-norm.r);
  const double per_t = -g.g_h * kLn2, per_difference = g.g_r * kLn2;
  Coefficients out;
  out.center = static_cast<float>(g.r * kLog2e);
  // The part of t - s - R that the float center and the float normalisers left.
  const double off_center = out.center - g.r * kLog2e + norm.q - norm.r;
  const double constant = -g.g_l - g.g_h * g.h + g.g_f - per_t * norm.r + per_difference * off_center;
  out.constant = static_cast<float>(weight * constant);
  out.per_t = static_cast<float>(weight * per_t);
  out.per_difference = static_cast<float>(weight * per_difference);
  out.per_w = static_cast<float>(g.scale.factor * std::exp2(-norm.q) * g.g_f);
  out.modest = finite(norm.m) && finite(norm.n);
  for (const float coefficient : {out.constant, out.per_t, out.per_difference, out.per_w}) {
    out.modest = out.modest && std::fabs(coefficient) < 1e7f;  // false of a NaN
  }
  return out;
}

}  // namespace CMDP_ISA
}  // namespace cmdp
