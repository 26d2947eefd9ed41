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

// Of a column: its part of the value, its probability, G.
template <class Real>
struct MixtureTerms {
  Real value, p, slope;
};

// One column in double, x and y scaled by 1/temperature.
static inline MixtureTerms<double> mixture_column(const Mixture& mix, const RowNormalizers& norm, double x, double y) {
  const double log_p = norm.log_p(x), log_w = norm.log_w(y);
  const double p = std::exp(log_p), w = std::exp(log_w);
  const bool neither = p == 0 && w == 0;
  const double delta = neither ? 0 : std::fmax(-700.0, std::fmin(700.0, log_w - log_p));
  const double rho = std::exp(delta), g = (1 - mix.b) + mix.b * rho, log_g = std::log(g);
  return {p * (-mix.c_student * log_g) + w * mix.c_teacher * (delta - log_g), p,
          -mix.c_student * log_g - (1 - mix.b) * (mix.c_student + mix.c_teacher * rho) / g};
}

// A row as the fast kernels see it. p and w lack the factors 2^-r and 2^-q, `drift` is r - q.
struct MixtureRow {
  Mixture mix;
  Octaves octaves;
  float p_factor, w_factor, drift;

  MixtureRow(const Mixture& mix, const RowNormalizers& norm, float scale)
      : mix(mix),
        octaves{scale, norm.m, norm.n},
        p_factor(static_cast<float>(std::exp2(-norm.r))),
        w_factor(static_cast<float>(std::exp2(-norm.q))),
        drift(static_cast<float>(norm.r - norm.q)) {}

  // As mixture_column, kLanes columns at once, with logarithms in octaves.
  MixtureTerms<Floats> columns(const float* x, const float* y) const {
    const Floats scale = splat(octaves.scale), bottom = splat(-1e30f);
    const Floats t = max(multiply_add(load(x), scale, splat(-octaves.m)), bottom);
    const Floats s = max(multiply_add(load(y), scale, splat(-octaves.n)), bottom);
    const Floats p = exp2(t) * p_factor, w = exp2(s) * w_factor;
    const Floats delta = -max(-max(s - t + drift, splat(-126.0f)), splat(-126.0f));
    const Floats rho = exp2(delta);
    const float b = static_cast<float>(mix.b), rest = static_cast<float>(1 - mix.b);
    const float c_p = static_cast<float>(mix.c_student), c_w = static_cast<float>(mix.c_teacher);
    const float ln2 = static_cast<float>(kLn2);
    // In octaves until after the subtraction: where one model has no weight, delta and log g are both about 126.
    const Floats g = rho * b + rest, log2_g = log2(g);
    return {(w * c_w * (delta - log2_g) - p * c_p * log2_g) * ln2, p,
            log2_g * (-c_p * ln2) - rest * (rho * c_w + c_p) / g};
  }
};

static inline bool fast_mixture(const Logits& in, const RowNormalizers& norm) {
  return !is_wide(in) && std::fabs(norm.m) < kLargestReference && std::fabs(norm.n) < kLargestReference;
}

static MixtureValue mixture(const Logits& in, int64_t row, const Mixture& mix, const SavedRow* saved) {
  const RowNormalizers norm(saved[row]);
  const RowPair rows(in, row);
  double total = 0, mean = 0;
  if (fast_mixture(in, norm)) {
    const MixtureRow fast(mix, norm, scale_of(in.temperature).per_octave);
    alignas(64) float buffer_x[kBlock], buffer_y[kBlock];
    for (int64_t start = 0; start < in.vocab; start += kBlock) {
      const int64_t count = std::min(kBlock, in.vocab - start);
      const float* x = rows.x.floats(start, count, buffer_x);
      const float* y = rows.y.floats(start, count, buffer_y);
      Floats values{}, slopes{};
      const auto step = [&](const float* xs, const float* ys) {
        const MixtureTerms<Floats> terms = fast.columns(xs, ys);
        values += terms.value;
        slopes += terms.p * terms.slope;
      };
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) step(x + i, y + i);
      if (i < count) {
        float tail_x[kLanes], tail_y[kLanes];
        std::fill(tail_x, tail_x + kLanes, -__builtin_inff());
        std::fill(tail_y, tail_y + kLanes, -__builtin_inff());
        std::copy(x + i, x + count, tail_x);
        std::copy(y + i, y + count, tail_y);
        step(tail_x, tail_y);
      }
      total += sum_of_lanes(values);
      mean += sum_of_lanes(slopes);
    }
  } else {
    const double scale = natural_scale(in);
    for (int64_t i = 0; i < in.vocab; ++i) {
      const auto terms = mixture_column(mix, norm, scaled(rows.x[i], scale), scaled(rows.y[i], scale));
      total += terms.value;
      mean += terms.p * terms.slope;
    }
  }
  return {TokenState::at_least_zero(total), mean};
}

static void mixture_backward(const Logits& in, int64_t row, const Mixture& mix, const SavedRow* saved,
                             const MixtureGradient& gradient, const Matrix& out) {
  const OutRow to{row_of(out, row), out.dtype};
  if (!unmasked(in.mask, row)) {
    zero_columns(out, to.data, 0);
    return;
  }
  const RowNormalizers norm(saved[row]);
  const RowPair rows(in, row);
  const double scale = natural_scale(in), factor = gradient.upstream * scale, mean = gradient.mean;
  if (fast_mixture(in, norm)) {
    const MixtureRow row_in_octaves(mix, norm, scale_of(in.temperature).per_octave);
    const float center = static_cast<float>(mean), outer = static_cast<float>(factor);
    map_blocks(rows, in.vocab, true, to, [&](const Block<float, float>& block, float* dx) {
      const auto [x, y, count] = block;
      const MixtureRow fast = row_in_octaves;  // a copy, which no store to dx can change
      const auto step = [&](const float* xs, const float* ys, float* lanes) {
        const MixtureTerms<Floats> terms = fast.columns(xs, ys);
        store(lanes, terms.p * (terms.slope - center) * outer);
      };
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) step(x + i, y + i, dx + i);
      if (i < count) {
        float tail_x[kLanes] = {}, tail_y[kLanes] = {}, tail[kLanes];
        std::copy(x + i, x + count, tail_x);
        std::copy(y + i, y + count, tail_y);
        step(tail_x, tail_y, tail);
        std::copy(tail, tail + (count - i), dx + i);
      }
    });
  } else {
    for (int64_t i = 0; i < in.vocab; ++i) {
      const auto terms = mixture_column(mix, norm, scaled(rows.x[i], scale), scaled(rows.y[i], scale));
      to.set(i, factor * terms.p * (terms.slope - mean));
    }
  }
  zero_columns(out, to.data, in.vocab);
}

}  // namespace CMDP_ISA
}  // namespace cmdp
