// Statistics, and with a budget the whole method, in one launch.
//
// One block folds one segment of a row; into how many segments a row is cut depends on its width alone. The last block
// of a row to arrive merges the states of its segments, in a fixed order, and finishes the row; the last row of a
// sequence to arrive lets its block scan the sequence. Who is last differs from run to run, what it computes does not:
// the same row gives bitwise the same result in every run and every batch.
//
// Arrivals: a block writes what others will read, makes it visible (__threadfence) and counts itself with atomicInc,
// which wraps to zero at the last arrival, so that the counters are as they were when the kernel ends. Whoever was last
// issues a fence of its own before it reads; a barrier hands both on to the other threads of the block.
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
  float per_octave;
  double natural;
  float* statistics[6];
  double* saved;
  Scratch scratch;
  int64_t rows;
};

// True for the last of `count` arrivals.
__device__ __forceinline__ bool arrive(uint32_t* counter, uint32_t count) {
  __threadfence();
  const bool last = atomicInc(counter, count - 1) == count - 1;
  __threadfence();
  return last;
}

// Statistics and saved scalars of a row, by one thread.
__device__ __forceinline__ void write_row(const FoldArguments& a, uint32_t row, const TokenStats& stats) {
  const double values[6] = {stats.logprob,         stats.teacher_logprob, stats.entropy,
                            stats.teacher_entropy, stats.reverse_kl,      stats.forward_kl};
#pragma unroll
  for (int i = 0; i < 6; ++i) {
    if (a.statistics[i] != nullptr) a.statistics[i][row] = static_cast<float>(values[i]);
  }
}

template <class X, class Y>
__device__ __forceinline__ void finish_row(const FoldArguments& a, uint32_t row, TokenState& state, bool careful) {
  if (a.tokens != nullptr) {
    const int64_t token = a.tokens[row];
    // A token outside the vocabulary has no logit: NaN. The host cannot look without stalling the device.
    double x = NAN, y = NAN;
    if (token >= 0 && token < a.vocab) {
      x = scaled(column<X>(a.x.row<X>(row), token), a.natural);
      y = scaled(column<Y>(a.y.row<Y>(row), token), a.natural);
    }
    state.label(x, y);
  }
  const TokenStats stats = state.finish();
  write_row(a, row, stats);
  save_row(state, stats, careful, a.saved + int64_t{row} * kSaved);
}

// The states of the at most kWarp segments of a row, merged: that of lane 0 of the warp.
__device__ __forceinline__ TokenState merge_segments(const double* partial, int segments, bool& careful) {
  TokenState state = TokenState::empty();
  const int lane = threadIdx.x;
  if (lane < segments) {
    const double* p = partial + lane * kPartial;
    state.m = p[0], state.n = p[1], state.z = p[2], state.u = p[3], state.a = p[4], state.b = p[5];
    state.h = p[6], state.k = p[7], state.r_inf = p[8], state.f_inf = p[9];
    careful = p[10] != 0;
  }
  merge_lanes(state, segments);
  careful = __any_sync(kAll, careful);
  return state;
}

// Folds this block's segment, and finishes the row if it was the last. True, for threads of the first warp, once the
// row is finished.
template <class X, class Y, bool kAligned>
__device__ __forceinline__ bool fold_segment(const FoldArguments& a, uint32_t row, int segment) {
  if (a.mask != nullptr && a.mask[row] == 0) {
    if (segment == 0 && threadIdx.x == 0) {
      write_row(a, row, {0, 0, 0, 0, 0, 0});
      for (int i = 0; i < kSaved; ++i) a.saved[int64_t{row} * kSaved + i] = 0;
    }
    return segment == 0;
  }
  const int64_t start = segment * a.segment;
  const int64_t stop = start + a.segment < a.vocab ? start + a.segment : a.vocab;
  bool careful;
  TokenState state =
      fold<X, Y, kAligned>(a.x.row<X>(row), a.y.row<Y>(row), start, stop, a.per_octave, a.natural, careful);
  if (threadIdx.x >= kWarp) return false;
  if (a.segments > 1) {
    double* partial = a.scratch.partial + int64_t{row} * a.segments * kPartial;
    bool last = false;
    if (threadIdx.x == 0) {
      double* p = partial + segment * kPartial;
      p[0] = state.m, p[1] = state.n, p[2] = state.z, p[3] = state.u, p[4] = state.a, p[5] = state.b;
      p[6] = state.h, p[7] = state.k, p[8] = state.r_inf, p[9] = state.f_inf, p[10] = careful;
      last = arrive(a.scratch.arrived + row, a.segments);
    }
    if (!__any_sync(kAll, last)) return false;
    __syncwarp();
    careful = false;
    state = merge_segments(partial, a.segments, careful);
  }
  if (threadIdx.x == 0) finish_row<X, Y>(a, row, state, careful);
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
  Sequences sequences;
  Budget budget;
  Cost cost;
  ScanArguments scan;
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
      return {a.statistics[4], nullptr};
    case Cost::forward_kl:
      return {a.statistics[5], nullptr};
    case Cost::k1:
      return {a.statistics[0], a.statistics[1]};
    default:
      return {nullptr, a.statistics[1]};
  }
}

// All threads of the block.
__device__ __forceinline__ double limit_of(const Budget& budget, const Sequences& sequences, int64_t sequence,
                                           int64_t begin, int64_t stop) {
  double limit = budget.each.data == nullptr ? budget.all : number(budget.each, sequence * budget.stride);
  if (budget.per_token) {
    const int64_t count = count_kept(sequences.mask, begin, stop);
    limit = count > 0 ? limit * count : 0.0;
  }
  return static_cast<float>(limit);  // as the costs are rounded: a cost of 0.3 is within a budget of 0.3
}

// Sequences without tokens have no row that would settle them.
__device__ __forceinline__ void settle_empty(const Sequences& sequences, int64_t* first_violation) {
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < sequences.count; i += blockDim.x) {
    const Span span = span_of(sequences, i);
    if (span.stop <= span.begin) first_violation[i] = 0;
  }
}

// One block a segment of a row, and one more for sequences without tokens.
template <class X, class Y, bool kAligned>
__global__ void __launch_bounds__(kThreads, blocks<kAligned>())
    constrained_kernel(const __grid_constant__ ConstrainedArguments a) {
  const uint32_t row = blockIdx.x / a.fold.segments;
  if (row >= a.fold.rows) {
    settle_empty(a.sequences, a.scan.outcome.first_violation);
    return;
  }
  __shared__ int64_t settles;  // the sequence whose last row this was, or -1
  const bool finished = fold_segment<X, Y, kAligned>(a.fold, row, blockIdx.x - row * a.fold.segments);
  if (threadIdx.x == 0) {
    settles = -1;
    if (finished) {
      uint32_t* arrived = a.fold.scratch.arrived + a.fold.rows;
      const int64_t sequence = sequence_of(a.sequences, row);
      if (sequence >= 0) {
        const Span span = span_of(a.sequences, sequence);
        if (arrive(arrived + sequence, span.stop - span.begin)) settles = sequence;
      }
      // Offsets that are no offsets may leave counters behind; the last row of all clears them.
      if (a.sequences.offsets != nullptr && arrive(arrived + a.sequences.count, a.fold.rows)) {
#pragma unroll 1
        for (int64_t i = 0; i < a.sequences.count; ++i) arrived[i] = 0;
      }
    }
  }
  __syncthreads();
  if (settles < 0) return;
  const Span span = span_of(a.sequences, settles);
  const double limit = limit_of(a.budget, a.sequences, settles, span.begin, span.stop);
  scan_sequence(a.scan, cost_of(a.fold, a.cost), a.sequences.mask, settles, span, limit);
}

}  // namespace cmdp::cuda
