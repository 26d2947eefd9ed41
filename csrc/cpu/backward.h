// Backward pass: the gradient of a row (gradient.h), vector by vector.
#pragma once

#include "forward.h"

namespace cmdp {
inline namespace CMDP_ISA {

static inline RowGradient row_gradient(const Logits& in, int64_t row, const Upstream& up, const double* saved) {
  const auto g = [&](int i) { return up.g[i] != nullptr ? up.g[i][row] : 0.0; };
  return row_gradient(g(0), g(1), g(2), g(3), saved, natural_scale(in));
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

  const Coefficients k = coefficients_of(g, norm);
  const bool fast = saved[6] == 0 && k.modest;
  if (fast) {
    const float scale = scale_of(in.temperature).per_octave;
    const bool forward_kl = k.c[3] != 0, teacher = forward_kl || k.c[2] != 0;
    const auto block = [&](const auto* bx, const auto* by, auto* dx, int64_t count) {
      if (forward_kl) {
        gradient_block<true, true>(bx, by, dx, count, scale, norm.m, norm.n, k.center, k.c);
      } else if (teacher) {
        gradient_block<true, false>(bx, by, dx, count, scale, norm.m, norm.n, k.center, k.c);
      } else {
        gradient_block<false, false>(bx, by, dx, count, scale, norm.m, norm.n, k.center, k.c);
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
