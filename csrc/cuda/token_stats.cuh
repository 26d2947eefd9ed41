// Statistics, and with a budget the whole method, in one launch.
//
// One block folds one segment of a row; into how many segments a row is cut depends on its width alone. The last block
// of a row to arrive merges the states of its segments, in a fixed order, and finishes the row; the last row of a
// sequence to arrive lets its block scan the sequence. Which block is last differs from run to run, its result does
// not: the same row gives bitwise the same result in every run and every batch.
//
// Arrivals: a block writes what others will read, makes it visible (__threadfence) and counts itself with atomicInc,
// which wraps to zero at the last arrival, so that the counters are as they were when the kernel ends. The last one to
// arrive issues a fence of its own before it reads; a barrier hands both on to the other threads of the block.
#pragma once

#include "../gradient.h"
#include "fold.cuh"
#include "launch.h"
#include "scan.cuh"

namespace cmdp::cuda {

struct FoldArguments {
  Rows x, y;
  const int64_t* tokens;
  const uint8_t* mask;
  int64_t vocab;
  int64_t segment;  // columns of a segment
  int segments;     // of a row, at most kWarp
  Scale scale;
  float* statistics[kStatistics];
  SavedRow* saved;
  Scratch scratch;
  int64_t rows;
};

// The statistics of a row, by one thread.
__device__ __forceinline__ void write_statistics(const FoldArguments& a, uint32_t row, const TokenStats& stats) {
  const auto values = stats.in_order();
#pragma unroll
  for (int i = 0; i < kStatistics; ++i) {
    if (a.statistics[i] != nullptr) a.statistics[i][row] = static_cast<float>(values[i]);
  }
}

template <class X, class Y>
__device__ __forceinline__ void finish_row(const FoldArguments& a, uint32_t row, TokenState& state, bool exact) {
  if (a.tokens != nullptr) {
    const int64_t token = a.tokens[row];
    // A token outside the vocabulary has no logit: NaN. The host cannot look without stalling the device.
    double x = NAN, y = NAN;
    if (token >= 0 && token < a.vocab) {
      x = scaled(column<X>(a.x.row<X>(row), token), a.scale.natural);
      y = scaled(column<Y>(a.y.row<Y>(row), token), a.scale.natural);
    }
    state.label(x, y);
  }
  const TokenStats stats = state.finish();
  write_statistics(a, row, stats);
  a.saved[row] = saved_row(state, stats, exact);
}

// The states of the at most kWarp segments of a row, merged: that of lane 0 of the warp.
__device__ __forceinline__ TokenState merge_segments(const PartialState* partial, int segments, bool& exact) {
  TokenState state = TokenState::empty();
  const int lane = threadIdx.x;
  if (lane < segments) {
    const PartialState& p = partial[lane];
    state.m = p.m, state.n = p.n, state.z = p.z, state.u = p.u, state.a = p.a, state.b = p.b;
    state.h = p.h, state.k = p.k, state.r_inf = p.r_inf, state.f_inf = p.f_inf;
    exact = p.exact != 0;
  }
  merge_lanes(state, segments);
  exact = __any_sync(kAll, exact);
  return state;
}

// Folds this block's segment, and finishes the row if it was the last. True, for threads of the first warp, once the
// row is finished.
template <class X, class Y, bool kAligned>
__device__ __forceinline__ bool fold_segment(const FoldArguments& a, uint32_t row, uint32_t segment) {
  if (!unmasked(a.mask, row)) {
    if (segment == 0 && threadIdx.x == 0) write_statistics(a, row, {}), a.saved[row] = {};
    return segment == 0;
  }
  const int64_t start = int64_t{segment} * a.segment;
  const int64_t stop = start + a.segment < a.vocab ? start + a.segment : a.vocab;
  bool exact;
  const Segment<X, Y> columns{a.x.row<X>(row), a.y.row<Y>(row), start, stop};
  TokenState state = fold<X, Y, kAligned>(columns, a.scale, exact);
  if (threadIdx.x >= kWarp) return false;
  if (a.segments > 1) {
    PartialState* partial = a.scratch.partial + row * a.segments;  // fits 32 bits: there are fewer blocks
    bool last = false;
    if (threadIdx.x == 0) {
      partial[segment] = {state.m, state.n, state.z,     state.u,     state.a,          state.b,
                          state.h, state.k, state.r_inf, state.f_inf, exact ? 1.0 : 0.0};
      last = arrive(a.scratch.arrived + row, a.segments);
    }
    if (!__any_sync(kAll, last)) return false;
    __syncwarp();
    exact = false;
    state = merge_segments(partial, a.segments, exact);
  }
  if (threadIdx.x == 0) finish_row<X, Y>(a, row, state, exact);
  return true;
}

template <class X, class Y, bool kAligned>
__global__ void __launch_bounds__(kThreads, blocks<kAligned>())
    token_stats_kernel(const __grid_constant__ FoldArguments a) {
  const uint32_t row = blockIdx.x / a.segments;
  fold_segment<X, Y, kAligned>(a, row, blockIdx.x - row * a.segments);
}

struct ConstrainedArguments {
  FoldArguments fold;
  Method method;
};

// The cost of a token, as the operations on their own round it: a statistic, or the difference of two.
struct StatisticCost {
  const float *plus, *minus;

  __device__ __forceinline__ double operator[](int64_t i) const {
    const float value = minus == nullptr ? plus[i] : plus == nullptr ? -minus[i] : plus[i] - minus[i];
    return value;
  }
};

__device__ __forceinline__ StatisticCost cost_of(const FoldArguments& a, Cost cost) {
  switch (cost) {
    case Cost::reverse_kl:
      return {a.statistics[kReverseKl], nullptr};
    case Cost::forward_kl:
      return {a.statistics[kForwardKl], nullptr};
    case Cost::k1:
      return {a.statistics[kLogprob], a.statistics[kTeacherLogprob]};
    default:
      return {nullptr, a.statistics[kTeacherLogprob]};
  }
}

// All threads of the block.
__device__ __forceinline__ double limit_of(const Budget& budget, const Sequences& sequences, int64_t sequence,
                                           const Span& span) {
  // Rounded as the costs are: a cost of 0.3 is within a budget of 0.3.
  double limit = static_cast<float>(budget.each.data == nullptr ? budget.all : budget.each[sequence * budget.stride]);
  if (budget.per_token) {
    const int64_t count = count_unmasked(sequences.mask, span);
    limit = count > 0 ? limit * count : 0.0;  // and the sum of so many, which is not rounded
  }
  return limit;
}

// A sequence without tokens has no row that would settle it.
__device__ __forceinline__ void settle_empty(const Sequences& sequences, int64_t* first_violation) {
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < sequences.count; i += blockDim.x) {
    const Span span = span_of(sequences, i);
    if (span.stop <= span.begin) first_violation[i] = 0;
  }
}

// One block per segment of a row, and one more for sequences without tokens.
template <class X, class Y, bool kAligned>
__global__ void __launch_bounds__(kThreads, blocks<kAligned>())
    constrained_kernel(const __grid_constant__ ConstrainedArguments a) {
  const Sequences& sequences = a.method.sequences;
  const uint32_t row = blockIdx.x / a.fold.segments;
  if (row >= a.fold.rows) {
    settle_empty(sequences, a.method.scan.trace.first_violation);
    return;
  }
  __shared__ int64_t settles;  // the sequence whose last row this was, or -1
  const bool finished = fold_segment<X, Y, kAligned>(a.fold, row, blockIdx.x - row * a.fold.segments);
  if (threadIdx.x == 0) {
    settles = -1;
    if (finished) {
      uint32_t* arrived = a.fold.scratch.arrived + a.fold.rows;
      const int64_t sequence = sequence_of(sequences, row);
      if (sequence >= 0) {
        const Span span = span_of(sequences, sequence);
        if (arrive(arrived + sequence, span.stop - span.begin)) settles = sequence;
      }
      // Offsets that are no offsets may leave counters behind; the last row of all clears them.
      if (sequences.offsets != nullptr && arrive(arrived + sequences.count, a.fold.rows)) {
#pragma unroll 1
        for (int64_t i = 0; i < sequences.count; ++i) arrived[i] = 0;
      }
    }
  }
  __syncthreads();
  if (settles < 0) return;
  const Span span = span_of(sequences, settles);
  const double limit = limit_of(a.method.budget, sequences, settles, span);
  scan_sequence(a.method.scan, cost_of(a.fold, a.method.cost), sequences.mask, settles, span, limit);
}

}  // namespace cmdp::cuda
