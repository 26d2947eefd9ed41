// Gradient of the student's logits: one expression per column (gradient.h), one pass.
//
// One block does kSpan columns of a row. Its first thread computes the row's coefficients and the gradient of the
// token's own column, in double, before anything is written: the output may be the logits themselves. Each thread then
// reads columns of its own and writes them, by 128 bits where rows are aligned. A row with special values, or with
// coefficients so large that float32 may overflow on the way, is done in double.
#pragma once

#include "../gradient.h"
#include "device.cuh"
#include "launch.h"

namespace cmdp::cuda {

// Four steps of a block of 256 threads: the coefficients take a single thread some hundred double operations, while the
// other blocks of the multiprocessor stream.
constexpr int64_t kSpan = 16384;

struct BackwardArguments {
  Rows x, y, out;
  const int64_t* tokens;
  const uint8_t* mask;
  const SavedRow* saved;
  Upstream<float> upstream;
  int64_t vocab, width, first_column;
  int spans;  // of a row
  Scale scale;
};

// What the threads of a block share of a row.
struct RowTask {
  Coefficients k;
  float m, n;
  bool exact;  // the row needs the exact way
};

template <bool kTeacher>
__device__ __forceinline__ float gradient(const RowTask& task, float x, float y, float scale) {
  const float t = fmaf(x, scale, -task.m), p = ex2(t);
  float factor = fmaf(t, task.k.per_t, task.k.constant), s = 0;
  if constexpr (kTeacher) {
    s = fmaf(y, scale, -task.n);
    factor = fmaf((t - s) - task.k.center, task.k.per_difference, factor);
  }
  // Where p is 0 the bracket may overflow, and 0 * anything = 0.
  const float value = p * (p == 0 ? 0.0f : factor);
  return kTeacher ? fmaf(ex2(s), -task.k.per_w, value) : value;
}

template <class T, class S, bool kAligned>
__device__ __forceinline__ void zero(typename T::Element* row, int64_t start, int64_t stop) {
  if constexpr (kAligned) {  // `start` lies at a multiple of kVector where a whole row is zeroed
    constexpr int kWords = S::kVector / T::kColumns;
    const uint32_t nothing[kWords] = {};
    if (start % S::kVector == 0) {
      const int64_t whole = stop / S::kVector * S::kVector;
      for (int64_t i = start + threadIdx.x * S::kVector; i < whole; i += blockDim.x * S::kVector) {
        store<T, kWords>(row + i, nothing);
      }
      start = whole > start ? whole : start;
    }
  }
  for (int64_t i = start + threadIdx.x; i < stop; i += blockDim.x) row[i] = 0;
}

// kVector columns, as words.
template <class X, class Y, class S, bool kTeacher>
__device__ __forceinline__ void gradient_piece(const uint32_t* xs, const uint32_t* ys, const RowTask& task, float scale,
                                               uint32_t* out) {
  float values[S::kVector];
#pragma unroll
  for (int i = 0; i < S::kVector; ++i) {
    const float y = kTeacher ? widen<Y>(ys[i / Y::kColumns], i % Y::kColumns) : 0.0f;
    values[i] = gradient<kTeacher>(task, widen<X>(xs[i / X::kColumns], i % X::kColumns), y, scale);
  }
#pragma unroll
  for (int i = 0; i < S::kVector / X::kColumns; ++i) {
    if constexpr (X::kColumns == 1) {
      out[i] = std::bit_cast<uint32_t>(values[i]);
    } else {
      out[i] = pack<X>(values[2 * i], values[2 * i + 1]);
    }
  }
}

template <class X, class Y, bool kTeacher, bool kAligned>
__global__ void __launch_bounds__(kThreads, blocks<kAligned>())
    backward_kernel(const __grid_constant__ BackwardArguments a) {
  using S = Shape<X, Y>;
  constexpr int kWordsX = S::kVector / X::kColumns, kWordsY = S::kVector / Y::kColumns;
  __shared__ RowTask shared;
  __shared__ typename X::Element own;
  const uint32_t row = blockIdx.x / a.spans;
  const int64_t start = (blockIdx.x - row * a.spans) * kSpan;
  const int64_t stop = start + kSpan < a.width ? start + kSpan : a.width;
  const int64_t end = stop < a.vocab ? stop : a.vocab;  // columns that count
  auto* to = a.out.row<X>(row);
  if (!unmasked(a.mask, row)) {
    zero<X, S, kAligned>(to, start, stop);
    return;
  }
  const auto* x = a.x.row<X>(row);
  const auto* y = kTeacher ? a.y.row<Y>(row) : nullptr;
  const int64_t token = a.upstream.logprob != nullptr ? a.tokens[row] - a.first_column : -1;
  const bool own_here = start <= token && token < end;
  const auto exactly = [&](const RowGradient& g, const RowNormalizers& norm, int64_t i, bool is_own) {
    return narrow<X>(
        static_cast<float>(column_gradient(g, norm, column<X>(x, i), kTeacher ? column<Y>(y, i) : 0.0f, is_own)));
  };
  if (threadIdx.x == 0) {
    const SavedRow saved = a.saved[row];
    const RowGradient g = row_gradient<kTeacher>(a.upstream, row, saved, {a.scale.natural, 0});
    const RowNormalizers norm(saved);
    shared.k = coefficients_of(g, norm);
    shared.m = norm.m, shared.n = norm.n;
    shared.exact = saved.exact != 0 || !shared.k.modest;
    if (own_here) own = exactly(g, norm, token, true);
  }
  __syncthreads();
  const RowTask task = shared;
  if (task.exact) {
    const SavedRow saved = a.saved[row];
    const RowGradient g = row_gradient<kTeacher>(a.upstream, row, saved, {a.scale.natural, 0});
    const RowNormalizers norm(saved);
#pragma unroll 1
    for (int64_t i = start + threadIdx.x; i < end; i += blockDim.x) to[i] = exactly(g, norm, i, false);
  } else if constexpr (kAligned) {
    const int tile = static_cast<int>(blockDim.x) * S::kStep;
    int64_t at = start + first_column<S>();
#pragma unroll 1
    for (; at + S::kHop + S::kVector <= end; at += tile) {
      uint32_t xs[S::kPieces * kWordsX], ys[S::kPieces * kWordsY], out[kWordsX];
      read<X, S, true>(x + at, xs);
      if constexpr (kTeacher) read<Y, S, true>(y + at, ys);
#pragma unroll
      for (int piece = 0; piece < S::kPieces; ++piece) {
        gradient_piece<X, Y, S, kTeacher>(xs + piece * kWordsX, ys + piece * kWordsY, task, a.scale.per_octave, out);
        store<X, kWordsX>(to + at + piece * S::kHop, out);
      }
    }
#pragma unroll 1
    for (int piece = 0; piece < S::kPieces; ++piece, at += S::kHop) {
#pragma unroll 1
      for (int64_t i = at; i < end && i < at + S::kVector; ++i) {
        const float other = kTeacher ? column<Y>(y, i) : 0.0f;
        to[i] = narrow<X>(gradient<kTeacher>(task, column<X>(x, i), other, a.scale.per_octave));
      }
    }
  } else {
    constexpr int kBatch = 4;  // columns in flight
    const int64_t tile = static_cast<int64_t>(blockDim.x) * kBatch;
#pragma unroll 1
    for (int64_t base = start + threadIdx.x; base < end; base += tile) {
      float values[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t at = base + i * blockDim.x < end ? base + i * blockDim.x : base;
        values[i] = gradient<kTeacher>(task, column<X>(x, at), kTeacher ? column<Y>(y, at) : 0.0f, a.scale.per_octave);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (base + i * blockDim.x < end) to[base + i * blockDim.x] = narrow<X>(values[i]);
      }
    }
  }
  zero<X, S, kAligned>(to, end > start ? end : start, stop);
  if (own_here) {
    __syncthreads();
    if (threadIdx.x == 0) to[token] = own;
  }
}

}  // namespace cmdp::cuda
