// The columns of a segment of a row, folded into one TokenState by the threads of a block.
//
// Memory is read once and every thread keeps a state of its own: the loop has neither a barrier nor a shuffle. Within
// it everything is float32 and in octaves: with L = log2(e)/temperature a column has t = L x - m and s = L y - n, one
// fused multiply-add each, and adds to z, u, a, b, h, k as in token_state.h. Any references m, n are exact; they follow
// the maximum at a distance, being raised only where it has passed them by more than kSlack octaves, which keeps powers
// in range, t and s small and the loop short: a step of 16 columns looks for its maximum two columns at a time before
// they are widened, and seldom raises anything. Differences t - s are taken relative to the references, so that a
// common shift of one model's logits costs no precision.
//
// The loop takes logits as a language model says them. -inf, NaN, infinities or an abyss such as finfo.min show up as a
// sum that is not finite (0 * inf), logits far from 0 as their reference; the block then folds its segment again,
// exactly: in double, with every special value.
#pragma once

#include "../scale.h"
#include "device.cuh"

namespace cmdp::cuda {

constexpr float kSlack = 8.0f;
// The reference of a thread that has seen no column. Finite, so that the first rise multiplies zeros by a number; a row
// whose every logit lies below it is folded exactly.
constexpr float kNowhere = -1e30f;

// Of a column, or of some together.
struct Weights {
  float student, teacher;
};

// A TokenState in octaves and float32, without the token's own logits.
struct Sums {
  float m, n, z, u, a, b, h, k;

  __device__ __forceinline__ static Sums empty() { return {kNowhere, kNowhere, 0, 0, 0, 0, 0, 0}; }

  __device__ __forceinline__ void raise(float new_m, float new_n) {
    const float drop = m - new_m, teacher_drop = n - new_n;
    shrink_sums(*this, drop, teacher_drop, ex2(drop), ex2(teacher_drop));
    m = new_m, n = new_n;
  }

  // One column, but for its weights, which are given back.
  template <bool kTail>
  __device__ __forceinline__ Weights push(float x, float y, float scale, bool counts) {
    const float t = fmaf(x, scale, -m), s = fmaf(y, scale, -n);
    float p = ex2(t), w = ex2(s);
    if constexpr (kTail) p = counts ? p : 0.0f, w = counts ? w : 0.0f;
    const float difference = t - s;
    a = fmaf(p, difference, a);
    b = fmaf(-w, difference, b);
    h = fmaf(p, t, h);
    k = fmaf(w, s, k);
    return {p, w};
  }

  // Columns that a thread has loaded together. kTail: only the first `count` of them count. Their weights are added up
  // first: beside a leading column, which weighs 1, small ones are lost in up to 2^-24 each time that some are added.
  template <class X, class Y, bool kTail, int kWordsX, int kWordsY>
  __device__ __forceinline__ void push_columns(const uint32_t (&xs)[kWordsX], const uint32_t (&ys)[kWordsY],
                                               float scale, int count) {
    const float top = highest<X>(xs) * scale, teacher_top = highest<Y>(ys) * scale;
    if (top > m + kSlack || teacher_top > n + kSlack) raise(fmaxf(m, top), fmaxf(n, teacher_top));
    Weights sum{};
#pragma unroll
    for (int i = 0; i < kWordsX * X::kColumns; ++i) {
      const float x = widen<X>(xs[i / X::kColumns], i % X::kColumns);
      const float y = widen<Y>(ys[i / Y::kColumns], i % Y::kColumns);
      const auto [p, w] = push<kTail>(x, y, scale, i < count);
      sum = i == 0 ? Weights{p, w} : Weights{sum.student + p, sum.teacher + w};
    }
    z += sum.student;
    u += sum.teacher;
  }

  // Merges kCount neighbouring lanes.
  template <int kCount>
  __device__ __forceinline__ void merge_lanes() {
    raise(max_of_lanes<kCount>(m), max_of_lanes<kCount>(n));
    z = sum_of_lanes<kCount>(z), u = sum_of_lanes<kCount>(u);
    a = sum_of_lanes<kCount>(a), b = sum_of_lanes<kCount>(b);
    h = sum_of_lanes<kCount>(h), k = sum_of_lanes<kCount>(k);
  }

  // Whether float arithmetic was enough.
  __device__ __forceinline__ bool usable() const {
    return is_reference(m) && is_reference(n) && z > 0 && u > 0 && finite(z) && finite(u) && finite(a) && finite(b) &&
           finite(h) && finite(k);
  }

  __device__ __forceinline__ TokenState state() const {
    TokenState out = TokenState::empty();
    out.m = m * kLn2, out.n = n * kLn2, out.z = z, out.u = u;
    out.a = a * kLn2, out.b = b * kLn2, out.h = h * kLn2, out.k = k * kLn2;
    return out;
  }
};

// Merges the states of the first `count` lanes of a warp, none of which has seen its label; those of the others up to
// the next power of two are empty. All are raised to the highest references at once, and then only have to be added.
__device__ __forceinline__ void merge_lanes(TokenState& s, int count) {
  const bool only_student = __any_sync(kAll, s.r_inf != 0), only_teacher = __any_sync(kAll, s.f_inf != 0);
  double top = s.m, teacher_top = s.n;
#pragma unroll 1
  for (int apart = 1; apart < count; apart *= 2) {
    top = fmax(top, __shfl_xor_sync(kAll, top, apart));
    teacher_top = fmax(teacher_top, __shfl_xor_sync(kAll, teacher_top, apart));
  }
  s.raise(top, teacher_top);
  s.r_inf = s.f_inf = 0;
#pragma unroll 1
  for (int apart = 1; apart < count; apart *= 2) {
    const auto from = [apart](double value) { return __shfl_xor_sync(kAll, value, apart); };
    TokenState other = TokenState::empty();
    other.z = from(s.z), other.u = from(s.u), other.a = from(s.a), other.b = from(s.b);
    other.h = from(s.h), other.k = from(s.k);
    s.add(other);
  }
  s.r_inf = only_student, s.f_inf = only_teacher;
}

// The highest finite logit of columns [start, stop), over all threads of the block; -inf if there is none.
template <class T>
__device__ __forceinline__ float top_of(const typename T::Element* row, int64_t start, int64_t stop, float* shared) {
  float best = -INFINITY;
#pragma unroll 1
  for (int64_t i = start + threadIdx.x; i < stop; i += blockDim.x) {
    const float value = column<T>(row, i);
    if (value > best && value < INFINITY) best = value;
  }
  best = max_of_lanes(best);
  __syncthreads();  // every thread that read `shared` before is done
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = best;
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) best = fmaxf(best, shared[warp]);
  return best;
}

// The part of a pair of rows that a block folds: columns [start, stop).
template <class X, class Y>
struct Segment {
  const typename X::Element* x;
  const typename Y::Element* y;
  int64_t start, stop;
};

// The segment in double, through token_state.h. The state is that of thread 0.
template <class X, class Y>
__device__ __forceinline__ TokenState fold_exactly(const Segment<X, Y>& segment, double scale, float* shared,
                                                   TokenState* shared_states) {
  const auto [x, y, start, stop] = segment;
  TokenState state = TokenState::empty();
  // From the common maxima on nothing has to be raised, neither by a column nor for merging threads.
  const double top = top_of<X>(x, start, stop, shared), teacher_top = top_of<Y>(y, start, stop, shared);
  state.raise(scaled(top, scale), scaled(teacher_top, scale));
#pragma unroll 1
  for (int64_t i = start + threadIdx.x; i < stop; i += blockDim.x) {
    state.add_column(scaled(column<X>(x, i), scale), scaled(column<Y>(y, i), scale));
  }
  merge_lanes(state, kWarp);
  if (threadIdx.x % kWarp == 0) shared_states[threadIdx.x / kWarp] = state;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) state.add(shared_states[warp]);
  }
  return state;
}

// The state of a segment, which is that of thread 0, and whether it was folded exactly.
template <class X, class Y, bool kAligned>
__device__ __forceinline__ TokenState fold(const Segment<X, Y>& segment, const Scale& scale, bool& exact) {
  using S = Shape<X, Y>;
  const auto [x, y, start, stop] = segment;
  __shared__ Sums warps[kWarps];
  __shared__ TokenState exact_warps[kWarps];
  Sums sums = Sums::empty();
  const int tile = static_cast<int>(blockDim.x) * S::kStep, tiles = static_cast<int>(stop - start) / tile;
  const auto* x_at = x + start + first_column<S>();
  const auto* y_at = y + start + first_column<S>();
#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    uint32_t xs[S::kStep / X::kColumns], ys[S::kStep / Y::kColumns];
    read<X, S, kAligned>(x_at, xs);
    read<Y, S, kAligned>(y_at, ys);
    sums.template push_columns<X, Y, false>(xs, ys, scale.per_octave, S::kStep);
    x_at += tile, y_at += tile;
  }
#pragma unroll 1
  for (int piece = 0; piece < S::kPieces; ++piece) {  // the rest, with fewer registers
    const int64_t first = start + int64_t{tiles} * tile + first_column<S>() + piece * S::kHop;
    if (first >= stop) break;
    const int count = static_cast<int>(stop - first);
    uint32_t xs[S::kVector / X::kColumns], ys[S::kVector / Y::kColumns];
    read_some<X>(x + first, count, xs);
    read_some<Y>(y + first, count, ys);
    sums.template push_columns<X, Y, true>(xs, ys, scale.per_octave, count);
  }
  sums.template merge_lanes<kWarp>();
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sums;
  __syncthreads();
  // Every warp merges the warps, and so every thread learns whether that was enough.
  const int warp = threadIdx.x % kWarps;
  sums = warp < static_cast<int>(blockDim.x) / kWarp ? warps[warp] : Sums::empty();
  sums.template merge_lanes<kWarps>();
  exact = !sums.usable();
  if (!exact) return sums.state();
  return fold_exactly(segment, scale.natural, &warps[0].m, exact_warps);
}

}  // namespace cmdp::cuda
