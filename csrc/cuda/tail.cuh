// The tail of a row (../tail.h): all columns but the listed ones, folded; and the gradient of its logits.
//
// Forward, one block folds one segment of a row. It first notes in shared memory which of its columns are listed, a bit
// each; a thread whose 16 columns of a step have no bit set adds them as fold.cuh does, of one model, and any other
// passes over those columns. The last block of a row to arrive merges its segments into the state (token_stats.cuh says
// how arrivals are counted). -inf, NaN, infinities and an abyss show up as a sum that is not finite, or none; the block
// then folds its segment again in double.
//
// Backward, one block does kSpan columns of a row as backward.cuh does, and writes over those that are listed.
#pragma once

#include "../tail.h"
#include "backward.cuh"
#include "fold.cuh"
#include "launch.h"

namespace cmdp::cuda {

struct ListedArguments {
  Rows x;
  const int64_t* ids;  // [rows, listed]
  int64_t listed;
  const int64_t* tokens;
  const uint8_t* mask;
  int64_t vocab, first_column;
  Scale scale;
};

struct TailArguments {
  ListedArguments rows;
  int64_t segment;  // columns of a segment: a multiple of 32, at most kTailSegment
  int segments;     // of a row
  TailStates states;
  TailFields* partial;  // [rows, segments]
  uint32_t* arrived;    // [rows]
};

struct TailBackwardArguments {
  ListedArguments rows;
  Rows out;
  TailGradient gradient;
  int64_t width;
  int spans;  // of a row
};

// body(j, column): number j of a row's list lies in a column of [start, stop), which is one of this thread's.
template <class Body>
__device__ __forceinline__ void each_listed(const ListedArguments& a, uint32_t row, int64_t start, int64_t stop,
                                            const Body& body) {
  const int64_t first = row * a.listed;
#pragma unroll 1
  for (int64_t j = first + threadIdx.x; j < first + a.listed; j += blockDim.x) {
    const int64_t id = a.ids[j], column = id - a.first_column;
    if (id >= 0 && column >= start && column < stop) body(j, column);
  }
}

// --------------------------------------------------------------------------------------------------------------
// Forward

// Sums in octaves and float32; `low` is a logit.
struct TailSums {
  float m, z, h, low;

  __device__ __forceinline__ static TailSums empty() { return {kNowhere, 0, 0, INFINITY}; }

  __device__ __forceinline__ void raise(float top) {
    const float drop = m - top, shrink = ex2(drop);
    h = fmaf(drop, z, h) * shrink;
    z *= shrink;
    m = top;
  }

  // Columns that a thread has loaded together. kSome: but for those whose bit is set in `gone`.
  template <class X, bool kSome, int kWords>
  __device__ __forceinline__ void push_columns(const uint32_t (&xs)[kWords], float scale, uint32_t gone) {
    constexpr int kCount = kWords * X::kColumns;
    float top = -INFINITY;
    if constexpr (kSome) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if ((gone >> i & 1) == 0) top = fmaxf(top, widen<X>(xs[i / X::kColumns], i % X::kColumns));
      }
    } else {
      top = highest<X>(xs);
    }
    top *= scale;
    if (top > m + kSlack) raise(top);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float x = widen<X>(xs[i / X::kColumns], i % X::kColumns), t = fmaf(x, scale, -m);
      const bool counts = !kSome || (gone >> i & 1) == 0;
      const float p = counts ? ex2(t) : 0.0f;
      z += p;
      h = fmaf(p, counts ? t : 0.0f, h);
      low = fminf(low, counts ? x : INFINITY);
    }
  }

  template <int kCount>
  __device__ __forceinline__ void merge_lanes() {
    raise(max_of_lanes<kCount>(m));
    z = sum_of_lanes<kCount>(z), h = sum_of_lanes<kCount>(h);
    low = -max_of_lanes<kCount>(-low);
  }
};

// Which columns of a segment are listed.
using ListedBits = int[kTailSegment / 32];

// Those of kCount neighbouring columns from `column` on, a multiple of kCount.
template <int kCount>
__device__ __forceinline__ uint32_t listed_bits(const ListedBits& bits, int64_t column) {
  return static_cast<uint32_t>(bits[column / 32]) >> (column % 32) & ((1u << kCount) - 1);
}

__device__ __forceinline__ double sum_of_lanes_exactly(double value) {
#pragma unroll 1
  for (int apart = kWarp / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(kAll, value, apart);
  return value;
}

// m, z and h of the columns that are not listed, in double and with every special value; those of thread 0.
template <class X>
__device__ __forceinline__ TailFields fold_tail_exactly(const typename X::Element* x, int columns, double scale,
                                                        const ListedBits& bits) {
  __shared__ float tops[kWarps];
  __shared__ double zs[kWarps], hs[kWarps];
  float best = -INFINITY;
#pragma unroll 1
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    const float value = column<X>(x, i);
    if (listed_bits<1>(bits, i) == 0 && value > best && value < INFINITY) best = value;
  }
  best = max_of_lanes(best);
  const unsigned warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if (threadIdx.x % kWarp == 0) tops[warp] = best;
  __syncthreads();
  for (unsigned other = 0; other < warps; ++other) best = fmaxf(best, tops[other]);
  const double m = best == -INFINITY ? 0 : scaled(best, scale);
  double z = 0, h = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    const float value = column<X>(x, i);
    if (listed_bits<1>(bits, i) != 0 || value == -INFINITY) continue;
    const double t = scaled(value, scale) - m, p = exp(t);
    z += p, h += p * t;
  }
  z = sum_of_lanes_exactly(z), h = sum_of_lanes_exactly(h);
  if (threadIdx.x % kWarp == 0) zs[warp] = z, hs[warp] = h;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (unsigned other = 1; other < warps; ++other) z += zs[other], h += hs[other];
  }
  return {z == 0 ? -TokenState::infinity() : m, z, h, 0};
}

// The columns of a segment that are not listed; those of thread 0.
template <class X, bool kAligned>
__device__ __forceinline__ TailFields fold_tail(const typename X::Element* x, int columns, const Scale& scale,
                                                const ListedBits& bits) {
  using S = Shape<X, X>;
  __shared__ TailSums warps[kWarps];
  TailSums sums = TailSums::empty();
  const int tile = static_cast<int>(blockDim.x) * S::kStep, tiles = columns / tile;
  int at = first_column<S>();
#pragma unroll 1
  for (int i = 0; i < tiles; ++i, at += tile) {
    uint32_t xs[S::kStep / X::kColumns];
    read<X, S, kAligned>(x + at, xs);
    uint32_t gone = 0;
#pragma unroll
    for (int piece = 0; piece < S::kPieces; ++piece) {
      gone |= listed_bits<S::kVector>(bits, at + piece * S::kHop) << piece * S::kVector;
    }
    if (gone == 0) {
      sums.template push_columns<X, false>(xs, scale.per_octave, 0);
    } else {
      sums.template push_columns<X, true>(xs, scale.per_octave, gone);
    }
  }
#pragma unroll 1
  for (int piece = 0; piece < S::kPieces; ++piece, at += S::kHop) {  // the rest, with fewer registers
    if (at >= columns) break;
    uint32_t xs[S::kVector / X::kColumns], gone = listed_bits<S::kVector>(bits, at);
    read_some<X>(x + at, columns - at, xs);
    if (columns - at < S::kVector) gone |= ~0u << (columns - at);
    sums.template push_columns<X, true>(xs, scale.per_octave, gone);
  }
  sums.template merge_lanes<kWarp>();
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sums;
  __syncthreads();
  // Every warp merges the warps, and so every thread learns whether that was enough.
  const int warp = threadIdx.x % kWarps;
  sums = warp < static_cast<int>(blockDim.x) / kWarp ? warps[warp] : TailSums::empty();
  sums.template merge_lanes<kWarps>();
  TailFields found{sums.m * kLn2, sums.z, sums.h * kLn2, 0};
  if (!(is_reference(sums.m) && sums.z > 0 && finite(sums.z) && finite(sums.h))) {
    found = fold_tail_exactly<X>(x, columns, scale.natural, bits);
  }
  found.low = scaled(sums.low, scale.natural);
  return found;
}

// One block per segment of a row.
template <class X, bool kAligned>
__global__ void __launch_bounds__(kThreads, blocks<kAligned>()) tail_kernel(const __grid_constant__ TailArguments a) {
  __shared__ ListedBits bits;
  const uint32_t row = blockIdx.x / a.segments, segment = blockIdx.x - row * a.segments;
  if (!unmasked(a.rows.mask, row)) return;
  const int64_t start = segment * a.segment;
  const int64_t stop = start + a.segment < a.rows.vocab ? start + a.segment : a.rows.vocab;
  const auto* x = a.rows.x.row<X>(row);
  for (int i = threadIdx.x; i < a.segment / 32; i += blockDim.x) bits[i] = 0;
  __syncthreads();
  each_listed(a.rows, row, start, stop, [&](int64_t j, int64_t i) {
    a.states.listed[j] = scaled(column<X>(x, i), a.rows.scale.natural);
    const int place = static_cast<int>(i - start);
    atomicAdd(bits + place / 32, static_cast<int>(1u << place % 32));  // each column is listed once
  });
  __syncthreads();
  const TailFields found = fold_tail<X, kAligned>(x + start, static_cast<int>(stop - start), a.rows.scale, bits);
  if (threadIdx.x != 0) return;
  const int64_t token = a.rows.tokens[row] - a.rows.first_column;
  if (token >= start && token < stop) a.states.own[row] = scaled(column<X>(x, token), a.rows.scale.natural);
  TailFields* partial = a.partial + int64_t{row} * a.segments;
  partial[segment] = found;
  if (!arrive(a.arrived + row, a.segments)) return;
  TailFields state = a.states.fields[row];
#pragma unroll 1
  for (int i = 0; i < a.segments; ++i) merge(state, partial[i]);
  a.states.fields[row] = state;
}

// --------------------------------------------------------------------------------------------------------------
// Backward

__device__ __forceinline__ float tail_gradient(const TailSlopes& slopes, float x, float scale) {
  const float t = fmaf(x, scale, -slopes.m), p = ex2(t);
  return p * (p == 0 ? 0.0f : fmaf(t, slopes.per_t, slopes.at_zero));  // of -inf the bracket is infinite or NaN
}

template <class X, bool kAligned>
__global__ void __launch_bounds__(kThreads, blocks<kAligned>())
    tail_backward_kernel(const __grid_constant__ TailBackwardArguments a) {
  using S = Shape<X, X>;
  constexpr int kWords = S::kVector / X::kColumns;
  __shared__ int read_at_all;
  __shared__ typename X::Element own;
  const uint32_t row = blockIdx.x / a.spans;
  const int64_t start = (blockIdx.x - row * a.spans) * kSpan;
  const int64_t stop = start + kSpan < a.width ? start + kSpan : a.width;
  const int64_t end = stop < a.rows.vocab ? stop : a.rows.vocab;  // columns that count
  auto* to = a.out.row<X>(row);
  if (!unmasked(a.rows.mask, row)) {
    zero<X, S, kAligned>(to, start, stop);
    return;
  }
  const double constant = a.gradient.constant[row], slope = a.gradient.slope[row], share = a.gradient.own[row];
  if (threadIdx.x == 0) read_at_all = constant != 0 || slope != 0 || share != 0;
  __syncthreads();
  bool any = false;
#pragma unroll 1
  for (int64_t j = threadIdx.x; j < a.rows.listed; j += blockDim.x) {
    any = any || a.gradient.listed[row * a.rows.listed + j] != 0;
  }
  if (any) atomicAdd(&read_at_all, 1);
  __syncthreads();
  if (read_at_all == 0) {
    zero<X, S, kAligned>(to, start, stop);
    return;
  }
  const auto* x = a.rows.x.row<X>(row);
  const TailColumn exact{
      a.gradient.reference[row], a.gradient.log_mass[row], constant, slope, {a.rows.scale.natural, 0}};
  const int64_t token = a.rows.tokens[row] - a.rows.first_column;
  const bool own_here = start <= token && token < end;
  // Before anything is written: the output may be the logits themselves.
  if (own_here && threadIdx.x == 0) own = narrow<X>(static_cast<float>(exact(column<X>(x, token)) + share));
  __syncthreads();
  const TailSlopes slopes(exact);
  const float scale = a.rows.scale.per_octave;
  if (exact.log_mass == -TokenState::infinity()) {
    zero<X, S, kAligned>(to, start, end > start ? end : start);
  } else if (!slopes.modest) {
#pragma unroll 1
    for (int64_t i = start + threadIdx.x; i < end; i += blockDim.x) {
      to[i] = narrow<X>(static_cast<float>(exact(column<X>(x, i))));
    }
  } else if constexpr (kAligned) {
    const int tile = static_cast<int>(blockDim.x) * S::kStep;
    int64_t at = start + first_column<S>();
#pragma unroll 1
    for (; at + S::kHop + S::kVector <= end; at += tile) {
      uint32_t xs[S::kStep / X::kColumns];
      read<X, S, true>(x + at, xs);
#pragma unroll
      for (int piece = 0; piece < S::kPieces; ++piece) {
        uint32_t out[kWords];
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
          const uint32_t word = xs[piece * kWords + i];
          const float low = tail_gradient(slopes, widen<X>(word, 0), scale);
          if constexpr (X::kColumns == 1) {
            out[i] = std::bit_cast<uint32_t>(low);
          } else {
            out[i] = pack<X>(low, tail_gradient(slopes, widen<X>(word, 1), scale));
          }
        }
        store<X, kWords>(to + at + piece * S::kHop, out);
      }
    }
#pragma unroll 1
    for (int piece = 0; piece < S::kPieces; ++piece, at += S::kHop) {
#pragma unroll 1
      for (int64_t i = at; i < end && i < at + S::kVector; ++i) {
        to[i] = narrow<X>(tail_gradient(slopes, column<X>(x, i), scale));
      }
    }
  } else {
#pragma unroll 4
    for (int64_t i = start + threadIdx.x; i < end; i += blockDim.x) {
      to[i] = narrow<X>(tail_gradient(slopes, column<X>(x, i), scale));
    }
  }
  zero<X, S, kAligned>(to, end > start ? end : start, stop);
  __syncthreads();  // what follows are other threads' columns
  if (own_here && threadIdx.x == 0) to[token] = own;
  __syncthreads();
  each_listed(a.rows, row, start, end,
              [&](int64_t j, int64_t i) { to[i] = narrow<X>(static_cast<float>(a.gradient.listed[j])); });
}

}  // namespace cmdp::cuda
