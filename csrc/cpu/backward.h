// Backward pass: one expression a column for the four upstream gradients g_l, g_H, g_R, g_F (method: the table of
// gradients in cmdp_fast/reference.py):
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
// token's own column is done apart, in double.
#pragma once

#include "forward.h"

namespace cmdp {
inline namespace CMDP_ISA {

// The normalisers of a row as the forward pass saved them, and in octaves as a float and what its rounding left.
struct RowNormalizers {
  double m_exact, n_exact, log_z, log_u;
  float m, n;
  double r, q;

  RowNormalizers(const double* saved)
      : m_exact(saved[0]), n_exact(saved[1]), log_z(saved[2]), log_u(saved[3]) {
    const double lx = (m_exact + log_z) * kLog2e, ly = (n_exact + log_u) * kLog2e;
    m = static_cast<float>(lx), n = static_cast<float>(ly);
    r = lx - m, q = ly - n;
  }
  double log_p(double x) const { return (x - m_exact) - log_z; }  // x scaled by 1/temperature
  double log_w(double y) const { return (y - n_exact) - log_u; }
};

struct RowGradient {
  double g_l, g_h, g_r, g_f;  // upstream; g_r is 0 where R is infinite: its true gradient is, and would poison the step
  double h, r;                // H and R
  double scale;
};

static inline RowGradient row_gradient(const Logits& in, int64_t row, const Upstream& up, const double* saved) {
  const auto g = [&](int i) { return up.g[i] != nullptr ? up.g[i][row] : 0.0; };
  const bool unbounded = saved[5] == TokenState::infinity();
  return {g(0), g(1), unbounded ? 0.0 : g(2), g(3), saved[4], unbounded ? 0.0 : saved[5], natural_scale(in)};
}

// One column in double, x and y raw. Excluded columns have probability 0, and 0 * anything = 0.
static inline double column_gradient(const RowGradient& g, const RowNormalizers& norm, double x, double y, bool own) {
  const double log_p = norm.log_p(scaled(x, g.scale)), log_w = norm.log_w(scaled(y, g.scale));
  const double p = std::exp(log_p), w = std::exp(log_w);
  double sum = g.g_l * ((own ? 1.0 : 0.0) - p);
  if (g.g_f != 0) sum += g.g_f * (p - w);
  if (p != 0) {
    if (g.g_h != 0) sum -= g.g_h * p * (log_p + g.h);
    if (g.g_r != 0) sum += g.g_r * p * (log_p - log_w - g.r);
  }
  return sum * g.scale;
}

template <bool kTeacher, bool kForwardKl, class X, class Y>
static inline void gradient_block(const X* x, const Y* y, X* out, int64_t count, float scale, float m, float n,
                                  float center, const float (&c)[4]) {
  const Floats per_octave = splat(scale), minus_m = splat(-m), minus_n = splat(-n);
  const auto step = [&](const auto* xs, const auto* ys, auto* to) {
    Floats t = multiply_add(load(xs), per_octave, minus_m);
    // An excluded column is clamped to where its weight is exactly zero.
    t = max(t, splat(kWeightless));
    Floats factor = t * c[1] + c[0], value;
    if constexpr (kTeacher) {
      const Floats s = max(multiply_add(load(ys), per_octave, minus_n), splat(-1e30f));
      factor = ((t - s) - center) * c[2] + factor;
      value = exp2(t) * factor;
      if constexpr (kForwardKl) value = value - exp2(s) * c[3];
    } else {
      value = exp2(t) * factor;
    }
    store(to, value);
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) step(x + i, y + i, out + i);
  if (i < count) {
    float tail_x[kLanes] = {}, tail_y[kLanes] = {}, tail[kLanes];
    for (int64_t j = i; j < count; ++j) {
      tail_x[j - i] = widen(x[j]);
      if constexpr (kTeacher) tail_y[j - i] = widen(y[j]);
    }
    step(static_cast<const float*>(tail_x), static_cast<const float*>(tail_y), static_cast<float*>(tail));
    for (int64_t j = i; j < count; ++j) narrow(tail[j - i], out + j);
  }
}

static inline void zero_columns(const Matrix& matrix, void* row, int64_t from) {
  if (matrix.width > from) {
    std::memset(static_cast<char*>(row) + from * matrix.element_size, 0, (matrix.width - from) * matrix.element_size);
  }
}

// Applies `block(x, y, out, count)` to the float blocks of a row, converting from and to the element type.
template <class Block>
static inline void map_blocks(const Logits& in, const void* x, const void* y, bool reads_teacher, void* out,
                              const Block& block) {
  alignas(64) float buffer_x[kBlock], buffer_y[kBlock], buffer_out[kBlock];
  const DType dtype = in.student.dtype;
  for (int64_t start = 0; start < in.vocab; start += kBlock) {
    const int64_t count = std::min(kBlock, in.vocab - start);
    const float* bx = as_floats(x, dtype, start, count, buffer_x);
    const float* by = reads_teacher ? as_floats(y, in.teacher.dtype, start, count, buffer_y) : bx;
    float* to = dtype == DType::float32 ? static_cast<float*>(out) + start : buffer_out;
    block(bx, by, to, count);
    if (dtype != DType::float32) from_floats(buffer_out, out, dtype, start, count);
  }
}

static void backward(const Logits& in, int64_t row, const Upstream& up, const double* saved, const Matrix& out) {
  void* to = row_of(out, row);
  if (in.mask != nullptr && in.mask[row] == 0) {
    zero_columns(out, to, 0);
    return;
  }
  const void* x = row_of(in.student, row);
  const void* y = row_of(in.teacher, row);
  saved += kSaved * row;
  const RowGradient g = row_gradient(in, row, up, saved);
  const RowNormalizers norm(saved);
  const auto column = [&](int64_t i, bool own) {
    return column_gradient(g, norm, element(x, in.student.dtype, i), element(y, in.teacher.dtype, i), own);
  };
  const int64_t token = own_column(in, row);
  // Before anything is written: the output may be the logits themselves.
  const double own = token >= 0 ? column(token, true) : 0;

  const double weight = g.scale * std::exp2(-norm.r);
  const double along_t = -g.g_h * kLn2, along_difference = g.g_r * kLn2;
  const float center = static_cast<float>(g.r * kLog2e);
  // What the float center and the float normalisers left of t - s - R.
  const double off_center = center - g.r * kLog2e + norm.q - norm.r;
  const double constant = -g.g_l - g.g_h * g.h + g.g_f - along_t * norm.r + along_difference * off_center;
  const float c[4] = {static_cast<float>(weight * constant), static_cast<float>(weight * along_t),
                      static_cast<float>(weight * along_difference),
                      static_cast<float>(g.scale * std::exp2(-norm.q) * g.g_f)};
  const auto modest = [](double value) { return finite(value) && std::fabs(value) < 1e7; };
  const bool exact = saved[6] != 0;
  const bool fast = !exact && modest(c[0]) && modest(c[1]) && modest(c[2]) && modest(c[3]) && finite(norm.m) &&
                    finite(norm.n);
  if (fast) {
    const float scale = scale_of(in.temperature).per_octave;
    const bool forward_kl = c[3] != 0, teacher = forward_kl || c[2] != 0;
    const auto block = [&](const auto* bx, const auto* by, auto* dx, int64_t count) {
      if (forward_kl) {
        gradient_block<true, true>(bx, by, dx, count, scale, norm.m, norm.n, center, c);
      } else if (teacher) {
        gradient_block<true, false>(bx, by, dx, count, scale, norm.m, norm.n, center, c);
      } else {
        gradient_block<false, false>(bx, by, dx, count, scale, norm.m, norm.n, center, c);
      }
    };
    if (in.student.dtype == DType::bfloat16 && (!teacher || in.teacher.dtype == DType::bfloat16)) {
      block(static_cast<const BFloat16*>(x), static_cast<const BFloat16*>(y), static_cast<BFloat16*>(to), in.vocab);
    } else {
      map_blocks(in, x, y, teacher, to, block);
    }
  } else {
    for (int64_t i = 0; i < in.vocab; ++i) set_element(to, in.student.dtype, i, column(i, false));
  }
  if (token >= 0) set_element(to, in.student.dtype, token, own);
  zero_columns(out, to, in.vocab);
}

}  // namespace CMDP_ISA
}  // namespace cmdp
