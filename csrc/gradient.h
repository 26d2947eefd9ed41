// What the backward pass needs of a row, and its one expression a column for the four upstream gradients g_l, g_H, g_R,
// g_F (method: the table of gradients in cmdp_fast/reference.py):
//
//   dx = [ g_l (1[v=a] - p) - g_H p (log p + H) + g_R p (log p - log w - R) + g_F (p - w) ] / temperature.
//
// In powers of two, with t = L x - M and s = L y - N where M, N are the normalisers rounded to float and r, q what the
// rounding left, p = 2^t 2^-r and w = 2^s 2^-q. All constants of the row fold into a few coefficients:
//
//   dx = 2^t (c0 + c1 t + c2 ((t - s) - center)) - c3 2^s,      center = R in octaves.
//
// Splitting the normalisers keeps p to a rounding error although L x may be large. t - s is taken as a difference, so
// that nearly equal models do not cancel, and R comes off it at once, so that models far apart do not either. The
// token's own column is done apart, in double. Header-only, free of any framework, like token_state.h.
#pragma once

#include "scale.h"
#include "token_state.h"

namespace cmdp {
inline namespace CMDP_ISA {

// Of a row: m, n, log z, log u (the log-normalisers are m + log z and n + log u; the parts are kept apart because m may
// be too large for the sum), H, R, and whether the row needs the exact way.
CMDP_HD static inline void save_row(const TokenState& state, const TokenStats& stats, bool exact, double* saved) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const bool valid = state.valid();
  saved[0] = valid ? state.m : nan;
  saved[1] = valid ? state.n : nan;
  saved[2] = valid ? std::log(state.z) : nan;
  saved[3] = valid ? std::log(state.u) : nan;
  saved[4] = stats.entropy;
  saved[5] = stats.reverse_kl;
  saved[6] = exact ? 1.0 : 0.0;
}

// The normalisers of a row as the forward pass saved them, and in octaves as a float and what its rounding left.
struct RowNormalizers {
  double m_exact, n_exact, log_z, log_u;
  float m, n;
  double r, q;

  CMDP_HD explicit RowNormalizers(const double* saved)
      : m_exact(saved[0]), n_exact(saved[1]), log_z(saved[2]), log_u(saved[3]) {
    const double lx = (m_exact + log_z) * kLog2e, ly = (n_exact + log_u) * kLog2e;
    m = static_cast<float>(lx), n = static_cast<float>(ly);
    r = lx - m, q = ly - n;
  }
  CMDP_HD double log_p(double x) const { return (x - m_exact) - log_z; }  // x scaled by 1/temperature
  CMDP_HD double log_w(double y) const { return (y - n_exact) - log_u; }
};

struct RowGradient {
  double g_l, g_h, g_r, g_f;  // upstream; g_r is 0 where R is infinite: its true gradient is, and would poison the step
  double h, r;                // H and R
  double scale;
};

CMDP_HD static inline RowGradient row_gradient(double g_l, double g_h, double g_r, double g_f, const double* saved,
                                               double scale) {
  const bool unbounded = saved[5] == TokenState::infinity();
  return {g_l, g_h, unbounded ? 0.0 : g_r, g_f, saved[4], unbounded ? 0.0 : saved[5], scale};
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
  return sum * g.scale;
}

struct Coefficients {
  float c[4], center;
  bool modest;  // float arithmetic does not overflow on the way to a finite result
};

CMDP_HD static inline Coefficients coefficients_of(const RowGradient& g, const RowNormalizers& norm) {
  const double weight = g.scale * std::exp2(-norm.r);
  const double along_t = -g.g_h * kLn2, along_difference = g.g_r * kLn2;
  Coefficients out;
  out.center = static_cast<float>(g.r * kLog2e);
  // What the float center and the float normalisers left of t - s - R.
  const double off_center = out.center - g.r * kLog2e + norm.q - norm.r;
  const double constant = -g.g_l - g.g_h * g.h + g.g_f - along_t * norm.r + along_difference * off_center;
  out.c[0] = static_cast<float>(weight * constant);
  out.c[1] = static_cast<float>(weight * along_t);
  out.c[2] = static_cast<float>(weight * along_difference);
  out.c[3] = static_cast<float>(g.scale * std::exp2(-norm.q) * g.g_f);
  out.modest = finite(norm.m) && finite(norm.n);
  for (int i = 0; i < 4; ++i) out.modest = out.modest && std::fabs(out.c[i]) < 1e7f;  // false of a NaN
  return out;
}

}  // namespace CMDP_ISA
}  // namespace cmdp
