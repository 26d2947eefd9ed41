// Divergences from a mixture: c_teacher KL(w‖M) + c_student KL(p‖M) with M = (1 - b) p + b w, 0 < b < 1.
//
// The mixture's logarithm needs both normalisers first, hence a second pass. Of each column the larger of p and w is
// taken as the unit: with rho <= 1 the smaller one in that unit, and b or 1 - b the share of the smaller one's model,
// the mixture is g times the larger one,
//
//   g = 1 - v,  v = share (1 - rho),   log(M/larger) = log g,  log(M/smaller) = log g - log rho.
//
// Neither logarithm is a difference of large numbers, and log g is that of 1 - v, to a relative error: no digits are
// lost where the models lie far apart, nor where a share is small.
//
//   value    sum p c_student log(p/M) + w c_teacher log(w/M)
//   gradient p (G - sum p G) / temperature,  G = c_student log(p/M) - (1 - b)(c_student p + c_teacher w)/M
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
  // 700 nats away one model has no weight in the column. Where both exclude it their difference is a NaN, and so 700.
  const double delta = std::fmax(-700.0, std::fmin(700.0, log_w - log_p));
  const bool ahead = delta > 0;  // the teacher's is the larger
  const double distance = std::fabs(delta), rho = std::exp(-distance), rest = 1 - mix.b;
  const double share = ahead ? rest : mix.b, unit = ahead ? mix.b : rest;
  const double v = -share * std::expm1(-distance), g = unit + share * rho;
  const double log_g = v < 0.25 ? std::log1p(-v) : std::log(g);
  const double of_student = log_g + (ahead ? distance : 0), of_teacher = log_g + (ahead ? 0 : distance);
  const double shares = ahead ? mix.c_student * rho + mix.c_teacher : mix.c_student + mix.c_teacher * rho;
  return {-(p * mix.c_student * of_student + w * mix.c_teacher * of_teacher), p,
          -mix.c_student * of_student - rest * shares / g};
}

// A row as the fast kernels see it. p and w lack the factors 2^-r and 2^-q, `drift` is r - q.
struct MixtureRow {
  Octaves octaves;
  float p_factor, w_factor, drift;
  float b, rest, c_p, c_w;

  MixtureRow(const Mixture& mix, const RowNormalizers& norm, float scale)
      : octaves{scale, norm.m, norm.n},
        p_factor(static_cast<float>(std::exp2(-norm.r))),
        w_factor(static_cast<float>(std::exp2(-norm.q))),
        drift(static_cast<float>(norm.r - norm.q)),
        b(static_cast<float>(mix.b)),
        rest(static_cast<float>(1 - mix.b)),
        c_p(static_cast<float>(mix.c_student)),
        c_w(static_cast<float>(mix.c_teacher)) {}

  // Columns in octaves below the normalisers.
  Floats student(const float* x) const { return in_octaves(x, octaves.m); }
  Floats teacher(const float* y) const { return in_octaves(y, octaves.n); }
  Floats in_octaves(const float* x, float reference) const {
    return max(multiply_add(load(x), splat(octaves.scale), splat(-reference)), splat(-1e30f));
  }

  // As mixture_column, kLanes columns at once, with logarithms in octaves.
  MixtureTerms<Floats> columns(const float* x, const float* y) const {
    const Floats t = student(x), s = teacher(y), delta = s - t + drift;
    const Ints ahead = less(Floats{}, delta);  // the teacher's is the larger
    const auto either = [&](float if_ahead, float if_not) { return select(ahead, splat(if_ahead), splat(if_not)); };
    const Floats distance = max(delta, -delta), rho = exp2(-distance);
    const Floats larger = exp2(select(ahead, s, t)) * either(w_factor, p_factor),
                 p = larger * select(ahead, rho, splat(1));
    const Floats share = either(rest, b), v = share - share * rho, g = share * rho + either(b, rest);
    const Floats log2_g = log2_one_less(g, v);
    const Floats c_smaller = either(c_p, c_w), shares = c_smaller * rho + either(c_w, c_p);
    const float ln2 = static_cast<float>(kLn2);
    const Floats of_student = log2_g + max(delta, Floats{});
    return {larger * (log2_g * shares + c_smaller * rho * distance) * -ln2, p,
            of_student * (-c_p * ln2) - shares * rest / g};
  }

  // Without the value p may be the unit in every column: where it is the smaller one what log(M/p) loses weighs little.
  MixtureTerms<Floats> slopes(const float* x, const float* y) const {
    const Floats t = student(x), delta = teacher(y) - t + drift;
    const Floats rho = exp2(-max(-delta, splat(-126.0f)));
    const Floats of_student = log2_one_less(rho * b + rest, b - rho * b);
    const float ln2 = static_cast<float>(kLn2);
    return {Floats{}, exp2(t) * p_factor, of_student * (-c_p * ln2) - (rho * c_w + c_p) * rest / (rho * b + rest)};
  }
};

// Whether floats hold the normalisers and both shares; and powers of two the teacher's share, however far apart the
// models. The student's is at least 2^-53, as 1 less a double.
static inline bool fast_mixture(const Logits& in, const Mixture& mix, const RowNormalizers& norm) {
  return !is_wide(in) && is_reference(norm.m) && is_reference(norm.n) && mix.b > 0x1p-100;
}

static MixtureValue mixture(const Logits& in, int64_t row, const Mixture& mix, const SavedRow* saved) {
  const RowNormalizers norm(saved[row]);
  const RowPair rows(in, row);
  double total = 0, mean = 0;
  if (fast_mixture(in, mix, norm)) {
    const MixtureRow fast(mix, norm, scale_of(in.temperature).per_octave);
    alignas(64) float buffer_x[kBlock], buffer_y[kBlock];
    for (int64_t start = 0; start < in.vocab; start += kBlock) {
      const int64_t count = std::min(kBlock, in.vocab - start);
      const float* x = rows.x.floats(start, count, buffer_x);
      const float* y = rows.y.floats(start, count, buffer_y);
      // In runs, as the sums of forward.h: a lane that adds up a block loses up to 2^-24 of its sum 264 times.
      Floats values{}, slopes{}, run_values{}, run_slopes{};
      const auto step = [&](const float* xs, const float* ys) {
        const MixtureTerms<Floats> terms = fast.columns(xs, ys);
        values += terms.value;
        slopes += terms.p * terms.slope;
      };
      int64_t i = 0;
      while (i + kLanes <= count) {
        for (const int64_t end = std::min(i + kRun, count); i + kLanes <= end; i += kLanes) step(x + i, y + i);
        run_values += values, run_slopes += slopes;
        values = slopes = Floats{};
      }
      if (i < count) {
        float tail_x[kLanes], tail_y[kLanes];
        std::fill(tail_x, tail_x + kLanes, -__builtin_inff());
        std::fill(tail_y, tail_y + kLanes, -__builtin_inff());
        std::copy(x + i, x + count, tail_x);
        std::copy(y + i, y + count, tail_y);
        step(tail_x, tail_y);
      }
      total += sum_of_lanes(run_values + values);
      mean += sum_of_lanes(run_slopes + slopes);
    }
  } else {
    const Natural scale = natural_scale(in);
    // In groups and blocks, so that no sum has many terms: beside a leading column small ones would be lost one by one.
    constexpr int64_t kGroup = TokenState::kGroup, kGroups = 32;
    for (int64_t i = 0; i < in.vocab;) {
      double block_total = 0, block_mean = 0;
      for (const int64_t end = std::min(in.vocab, i + kGroups * kGroup); i < end;) {
        double group_total = 0, group_mean = 0;
        for (const int64_t stop = std::min(end, i + kGroup); i < stop; ++i) {
          const auto terms = mixture_column(mix, norm, scaled(rows.x[i], scale), scaled(rows.y[i], scale));
          group_total += terms.value;
          group_mean += terms.p * terms.slope;
        }
        block_total += group_total, block_mean += group_mean;
      }
      total += block_total, mean += block_mean;
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
  const Natural scale = natural_scale(in);
  const double factor = gradient.upstream * scale.factor, mean = gradient.mean;
  if (fast_mixture(in, mix, norm)) {
    const MixtureRow row_in_octaves(mix, norm, scale_of(in.temperature).per_octave);
    const float center = static_cast<float>(mean), outer = static_cast<float>(factor);
    map_blocks(rows, in.vocab, true, to, [&](const Block<float, float>& block, float* dx) {
      const auto [x, y, count] = block;
      const MixtureRow fast = row_in_octaves;  // a copy, which no store to dx can change
      const auto step = [&](const float* xs, const float* ys, float* lanes) {
        const MixtureTerms<Floats> terms = fast.slopes(xs, ys);
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
