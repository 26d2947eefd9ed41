// Divergences from a mixture: c_teacher KL(w‖M) + c_student KL(p‖M) with M = (1 - b) p + b w, 0 < b < 1.
//
// The mixture's logarithm needs both normalisers first, hence a second pass. With rho = w/p = 2^delta the mixture
// is p g, g = (1 - b) + b rho, so that log p - log M = -log g and log w - log M = delta - log g: no logarithm of a
// probability is taken. Clamping delta to +-126 changes nothing: beyond it one model has no weight in the column,
// and delta - log g has reached its limit -log b.
//
//   value    sum p (-c_student log g) + w c_teacher (delta - log g)
//   gradient p (G - sum p G) / temperature,  G = -c_student log g - (1 - b)(c_student + c_teacher rho)/g
#pragma once

#include "backward.h"

namespace cmdp {
inline namespace CMDP_ISA {

struct MixtureTerms {
  double value, p, slope;  // contribution to the value, probability, G
};

static inline MixtureTerms mixture_column(const Mixture& mix, double log_p, double log_w) {
  const double p = std::exp(log_p), w = std::exp(log_w);
  const bool neither = p == 0 && w == 0;
  const double delta = neither ? 0 : std::fmax(-700.0, std::fmin(700.0, log_w - log_p));
  const double rho = std::exp(delta), g = (1 - mix.b) + mix.b * rho, log_g = std::log(g);
  return {p * (-mix.c_student * log_g) + w * mix.c_teacher * (delta - log_g), p,
          -mix.c_student * log_g - (1 - mix.b) * (mix.c_student + mix.c_teacher * rho) / g};
}

struct MixtureFloats {
  Floats value, p, slope;
};

// As mixture_column, with logarithms in octaves; p and w lack the factors 2^-r and 2^-q, `drift` is r - q.
static inline MixtureFloats mixture_floats(const Mixture& mix, Floats t, Floats s, float p_factor, float w_factor,
                                           float drift) {
  t = max(t, splat(-1e30f));
  s = max(s, splat(-1e30f));
  const Floats p = exp2(t) * p_factor, w = exp2(s) * w_factor;
  const Floats delta = -max(-max(s - t + drift, splat(-126.0f)), splat(-126.0f));
  const Floats rho = exp2(delta);
  const float b = static_cast<float>(mix.b), rest = static_cast<float>(1 - mix.b);
  const float c_p = static_cast<float>(mix.c_student), c_w = static_cast<float>(mix.c_teacher);
  const float ln2 = static_cast<float>(kLn2);
  // In octaves until after the subtraction: where one model has no weight, delta and log g are both about 126.
  const Floats g = rho * b + rest, octaves = log2(g);
  return {(w * c_w * (delta - octaves) - p * c_p * octaves) * ln2, p,
          octaves * (-c_p * ln2) - rest * (rho * c_w + c_p) / g};
}

static inline bool fast_mixture(const Logits& in, const RowNormalizers& norm) {
  return !is_wide(in) && std::fabs(norm.m) < kLargestReference && std::fabs(norm.n) < kLargestReference;
}

static void mixture(const Logits& in, int64_t row, const Mixture& mix, const double* saved, double* value,
                    double* mean) {
  const RowNormalizers norm(saved + kSaved * row);
  const void* x = row_of(in.student, row);
  const void* y = row_of(in.teacher, row);
  double total = 0, slope = 0;
  if (fast_mixture(in, norm)) {
    const float scale = scale_of(in.temperature).per_octave;
    const float p_factor = static_cast<float>(std::exp2(-norm.r)), w_factor = static_cast<float>(std::exp2(-norm.q));
    const float drift = static_cast<float>(norm.r - norm.q);
    alignas(64) float buffer_x[kBlock], buffer_y[kBlock];
    for (int64_t start = 0; start < in.vocab; start += kBlock) {
      const int64_t count = std::min(kBlock, in.vocab - start);
      const float* bx = as_floats(x, in.student.dtype, start, count, buffer_x);
      const float* by = as_floats(y, in.teacher.dtype, start, count, buffer_y);
      Floats sum{}, slopes{};
      const auto step = [&](const float* xs, const float* ys) {
        const MixtureFloats terms =
            mixture_floats(mix, multiply_add(load(xs), splat(scale), splat(-norm.m)),
                           multiply_add(load(ys), splat(scale), splat(-norm.n)), p_factor, w_factor, drift);
        sum += terms.value;
        slopes += terms.p * terms.slope;
      };
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) step(bx + i, by + i);
      if (i < count) {
        float tail_x[kLanes], tail_y[kLanes];
        std::fill(tail_x, tail_x + kLanes, -__builtin_inff());
        std::fill(tail_y, tail_y + kLanes, -__builtin_inff());
        std::copy(bx + i, bx + count, tail_x);
        std::copy(by + i, by + count, tail_y);
        step(tail_x, tail_y);
      }
      total += sum_of_lanes(sum);
      slope += sum_of_lanes(slopes);
    }
  } else {
    const double scale = natural_scale(in);
    for (int64_t i = 0; i < in.vocab; ++i) {
      const MixtureTerms terms = mixture_column(mix, norm.log_p(scaled(element(x, in.student.dtype, i), scale)),
                                                norm.log_w(scaled(element(y, in.teacher.dtype, i), scale)));
      total += terms.value;
      slope += terms.p * terms.slope;
    }
  }
  *value = TokenState::at_least_zero(total);
  *mean = slope;
}

static void mixture_backward(const Logits& in, int64_t row, const Mixture& mix, const double* saved, double mean,
                             double upstream, const Matrix& out) {
  void* to = row_of(out, row);
  if (in.mask != nullptr && in.mask[row] == 0) {
    zero_columns(out, to, 0);
    return;
  }
  const RowNormalizers norm(saved + kSaved * row);
  const void* x = row_of(in.student, row);
  const void* y = row_of(in.teacher, row);
  const double factor = upstream * natural_scale(in);
  if (fast_mixture(in, norm)) {
    const float scale = scale_of(in.temperature).per_octave;
    const float p_factor = static_cast<float>(std::exp2(-norm.r)), w_factor = static_cast<float>(std::exp2(-norm.q));
    const float drift = static_cast<float>(norm.r - norm.q), center = static_cast<float>(mean);
    const float outer = static_cast<float>(factor);
    map_blocks(in, x, y, true, to, [&](const float* bx, const float* by, float* dx, int64_t count) {
      const auto step = [&](const float* xs, const float* ys, float* to_lane) {
        const MixtureFloats terms =
            mixture_floats(mix, multiply_add(load(xs), splat(scale), splat(-norm.m)),
                           multiply_add(load(ys), splat(scale), splat(-norm.n)), p_factor, w_factor, drift);
        store(to_lane, terms.p * (terms.slope - center) * outer);
      };
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) step(bx + i, by + i, dx + i);
      if (i < count) {
        float tail_x[kLanes] = {}, tail_y[kLanes] = {}, tail[kLanes];
        std::copy(bx + i, bx + count, tail_x);
        std::copy(by + i, by + count, tail_y);
        step(tail_x, tail_y, tail);
        std::copy(tail, tail + (count - i), dx + i);
      }
    });
  } else {
    const double scale = natural_scale(in);
    for (int64_t i = 0; i < in.vocab; ++i) {
      const MixtureTerms terms = mixture_column(mix, norm.log_p(scaled(element(x, in.student.dtype, i), scale)),
                                                norm.log_w(scaled(element(y, in.teacher.dtype, i), scale)));
      set_element(to, in.student.dtype, i, factor * terms.p * (terms.slope - mean));
    }
  }
  zero_columns(out, to, in.vocab);
}

}  // namespace CMDP_ISA
}  // namespace cmdp
