// Backward pass: the gradient of a row (gradient.h), a vector at a time.
#pragma once

#include <limits>

#include "forward.h"

namespace cmdp {
inline namespace CMDP_ISA {

// A teacher's logit that is -inf, or as low as any that the forward pass leaves to floats: 0 * anything = 0.
constexpr float kLowest = kSeesRange ? -1e30f : std::numeric_limits<float>::lowest();

// `k` is a copy, which no store to `out` can change.
template <bool kTeacher, bool kForwardKl, class X, class Y>
static inline void gradient_block(const Block<X, Y>& block, X* out, const Octaves& octaves, Coefficients k) {
  const auto [x, y, count] = block;
  const Floats per_octave = splat(octaves.scale), minus_m = splat(-octaves.m), minus_n = splat(-octaves.n);
  const auto step = [&](const auto* xs, const auto* ys, auto* to) {
    Floats t = multiply_add(load(xs), per_octave, minus_m);
    // An excluded column is clamped to where its weight is exactly zero.
    t = max(t, splat(kWeightless));
    Floats factor = t * k.per_t + k.constant, value;
    if constexpr (kTeacher) {
      const Floats s = max(multiply_add(load(ys), per_octave, minus_n), splat(kLowest));
      const Floats apart = (t - s) - k.center, p = exp2(t);
      if constexpr (kSeesRange) {
        factor = apart * k.per_difference + factor;
        value = p * factor;
      } else {  // p first: what the rest of a column that weighs nothing comes to may be infinite
        value = apart * (p * k.per_difference) + p * factor;
      }
      if constexpr (kForwardKl) value = value - exp2(s) * k.per_w;
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

// Applies `body(block, out)` to the blocks of a row's first `vocab` columns as floats, converting from and to the
// element type. Without reads_teacher the block's y is its x.
template <class Body>
static inline void map_blocks(const RowPair& rows, int64_t vocab, bool reads_teacher, const OutRow& out,
                              const Body& body) {
  alignas(64) float buffer_x[kBlock], buffer_y[kBlock], buffer_out[kBlock];
  const bool in_place = out.dtype == DType::float32;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t count = std::min(kBlock, vocab - start);
    const float* x = rows.x.floats(start, count, buffer_x);
    const float* y = reads_teacher ? rows.y.floats(start, count, buffer_y) : x;
    float* to = in_place ? static_cast<float*>(out.data) + start : buffer_out;
    body(Block<float, float>{x, y, count}, to);
    if (!in_place) out.set_halves(buffer_out, start, count);
  }
}

static void backward(const Logits& in, int64_t row, const Upstream<double>& upstream, const SavedRow* saved_rows,
                     const Matrix& out) {
  const OutRow to{row_of(out, row), out.dtype};
  if (!unmasked(in.mask, row)) {
    zero_columns(out, to.data, 0);
    return;
  }
  const RowPair rows(in, row);
  const SavedRow& saved = saved_rows[row];
  const RowGradient g = row_gradient(upstream, row, saved, natural_scale(in));
  const RowNormalizers norm(saved);
  const auto column = [&](int64_t i, bool own) { return column_gradient(g, norm, rows.x[i], rows.y[i], own); };
  const int64_t token = own_column(in, row);
  // Before anything is written: the output may be the logits themselves.
  const double own = token >= 0 ? column(token, true) : 0;

  const Coefficients k = coefficients_of(g, norm);
  if (saved.exact == 0 && k.modest) {
    const Octaves octaves{scale_of(in.temperature).per_octave, norm.m, norm.n};
    const bool forward_kl = k.per_w != 0, teacher = forward_kl || k.per_difference != 0;
    const auto body = [&](const auto& block, auto* dx) {
      if (forward_kl) {
        gradient_block<true, true>(block, dx, octaves, k);
      } else if (teacher) {
        gradient_block<true, false>(block, dx, octaves, k);
      } else {
        gradient_block<false, false>(block, dx, octaves, k);
      }
    };
    if (rows.x.dtype == DType::bfloat16 && (!teacher || rows.y.dtype == DType::bfloat16)) {
      const auto* x = static_cast<const BFloat16*>(rows.x.data);
      const auto* y = static_cast<const BFloat16*>(rows.y.data);
      body(Block<BFloat16, BFloat16>{x, y, in.vocab}, static_cast<BFloat16*>(to.data));
    } else {
      map_blocks(rows, in.vocab, teacher, to, body);
    }
  } else {
    for (int64_t i = 0; i < in.vocab; ++i) to.set(i, column(i, false));
  }
  if (token >= 0) to.set(token, own);
  zero_columns(out, to.data, in.vocab);
}

}  // namespace CMDP_ISA
}  // namespace cmdp
