// Forward pass: folds the columns of a row, a block at a time, into the state of token_state.h.
//
// Within a block everything is float32 and in powers of two. With L = log2(e)/temperature (rounded to float) and
// block-wide references M, N, each column has t = L x - M and s = L y - N, one fused multiply-add each, and
//
//   z += 2^t    u += 2^s    a += 2^t (t - s)    b += 2^s (s - t)    h += 2^t t    k += 2^s s.
//
// L x stands for an exact logit: the state of the block is that of the logits (L ln 2) x with reference M ln 2. L ln 2
// differs from 1/temperature by less than 6e-8 relatively, the same for all columns and for the backward pass.
// Differences t - s are taken relative to the references, so that a common shift of one model's logits costs no
// precision. Across blocks the sums are double.
//
// The reference of a row's segment is the maximum of its first block; a block whose columns exceed it by kAbove
// octaves, weighed as the sums weigh them, gets its own. Maxima are therefore looked for in few blocks, and memory is
// read once.
//
// Rounding of a row that is nearly one-hot, whose entropy log z - h/z cancels: h is a sum of at most kAbove octaves a
// weight, which the float sums round by 2^-24 of it each. And its leading column weighs about 1, to which one lane adds
// what may be rounded off altogether, 2^-24 each time: 2 columns of its own step, the 7 steps after it and the 10 runs.
#pragma once

#include <algorithm>
#include <cmath>

#include "../arrays.h"
#include "../gradient.h"
#include "../scale.h"
#include "../token_state.h"
#include "dtype.h"
#include "kernels.h"

namespace cmdp {
inline namespace CMDP_ISA {

// Vectors per step and model: independent chains that hide the latency of the polynomial. NEON's multiply-add
// overwrites its addend, so that every constant of the polynomial is copied before it is used: three chains spill
// registers there (13.8 instructions per column; two take 12.9).
#if defined(__aarch64__) && !defined(CMDP_SVE)
constexpr int kUnroll = 2;
#else
constexpr int kUnroll = 3;
#endif
constexpr int64_t kStep = kUnroll * kLanes;
// Float sums are kept in three levels, a step, a run of 8 steps and a block of 11 or 16 runs, so that no lane makes
// more than some 20 additions of weights before its sum goes on in double. The buffers of a block stay in the L1 cache.
constexpr int64_t kRun = 8 * kStep;
constexpr int64_t kBlock = 33 / kUnroll * kRun;
// Columns that one thread folds. It depends on nothing else, so that the result of a row does not either.
constexpr int64_t kSegment = 8 * kBlock;
constexpr int64_t kAhead = 2048;  // columns between reading and prefetching

// Folded columns, and whether they needed the exact way: a StoredState with names.
struct SegmentState {
  TokenState state;
  double exact;
};
static_assert(sizeof(SegmentState) == sizeof(StoredState) && StoredState::kNumbers == TokenState::kFields + 1);

// How a kernel in float32 sees raw logits: t = scale x - m, s = scale y - n.
struct Octaves {
  float scale, m, n;
};

// A block of columns of both models.
template <class X, class Y>
struct Block {
  const X* x;
  const Y* y;
  int64_t count;
};

static inline bool is_wide(const Logits& in) {
  return in.student.dtype == DType::float64 || in.teacher.dtype == DType::float64;
}

static inline Natural natural_scale(const Logits& in) {
  return is_wide(in) ? Natural{1.0 / in.temperature, in.temperature} : Natural{scale_of(in.temperature).natural, 0};
}

constexpr float kAbove = 4.0f;  // octaves above the reference

struct BlockSums {
  float z, u, a, b, h, k;
  bool usable;           // float arithmetic was enough
  float only_x, only_y;  // > 0 if a column is excluded by the teacher alone (by the student alone)
};

// The six sums of one block. The plain version takes logits up to about 3 nats above the reference, as they weigh
// (further up t and h have lost digits), and 72 nats below it (AVX-512: any, SVE: 87): everything that a language model
// says. It reports any other block as not usable. With kExcluded, columns of -inf weigh zero instead of 0 * inf = NaN,
// and so do columns far below the reference. Where one model alone excludes a column, the divergence is infinite: the
// sum of its differences may be anything finite.
template <bool kExcluded, class X, class Y>
static inline BlockSums block_sums(const Block<X, Y>& block, const Octaves& octaves) {
  const auto [x, y, count] = block;
  Floats z{}, u{}, a{}, b{}, h{}, k{};                          // of the run
  Floats run_z{}, run_u{}, run_a{}, run_b{}, run_h{}, run_k{};  // of the runs before it
  Floats only_x{}, only_y{}, extreme{}, top = splat(-3e38f);
  Words seen{};
  const Floats factor = splat(octaves.scale), minus_m = splat(-octaves.m), minus_n = splat(-octaves.n);
  const auto step = [&]<bool kWithExcluded>(const auto* xs, const auto* ys) {
    Floats t[kUnroll], s[kUnroll], et[kUnroll], es[kUnroll];
    for (int j = 0; j < kUnroll; ++j) {
      t[j] = multiply_add(load(xs + j * kLanes), factor, minus_m);
      s[j] = multiply_add(load(ys + j * kLanes), factor, minus_n);
    }
    for (int j = 0; j < kUnroll; ++j) {
      if constexpr (kWithExcluded) {
        const Floats gone = splat(-__builtin_inff()), bottom = splat(-1e30f);
        const Ints one = (Ints)splat(1.0f);
        const Ints has_x = differs(load(xs + j * kLanes), gone), has_y = differs(load(ys + j * kLanes), gone);
        only_x += (Floats)(has_x & ~has_y & one);
        only_y += (Floats)(has_y & ~has_x & one);
        extreme += (Floats)(((has_x & less(t[j], bottom)) | (has_y & less(s[j], bottom))) & one);
        t[j] = max_or_nan(bottom, t[j]);  // weighs exactly nothing and stays finite; a NaN stays a NaN
        s[j] = max_or_nan(bottom, s[j]);
        top = max(top, max_or_nan(t[j], s[j]));
        et[j] = exp2(t[j]);
        es[j] = exp2(s[j]);
      } else {
        et[j] = exp2_in_range(t[j], seen);
        es[j] = exp2_in_range(s[j], seen);
      }
    }
    for (int j = 0; j < kUnroll; ++j) {
      const Floats difference = t[j] - s[j];
      a += et[j] * difference;
      b -= es[j] * difference;
    }
    Floats weight = et[0], teacher_weight = es[0];
    for (int j = 1; j < kUnroll; ++j) weight += et[j], teacher_weight += es[j];
    z += weight;
    u += teacher_weight;
    for (int j = 0; j < kUnroll; ++j) {
      h += et[j] * t[j];
      k += es[j] * s[j];
    }
  };
  const auto end_run = [&] {
    run_z += z, run_u += u, run_a += a, run_b += b, run_h += h, run_k += k;
    z = u = a = b = h = k = Floats{};
  };
  int64_t i = 0;
  while (i + kStep <= count) {
    for (const int64_t end = std::min(i + kRun, count); i + kStep <= end; i += kStep) {
      // The hardware prefetcher stops at every page; two pages ahead the next ones are asked for in time.
      for (int64_t line = 0; line < kStep; line += 64 / static_cast<int64_t>(sizeof(X))) {
        __builtin_prefetch(x + i + kAhead + line);
        __builtin_prefetch(y + i + kAhead + line);
      }
      step.template operator()<kExcluded>(x + i, y + i);
    }
    end_run();
  }
  if (i < count) {  // the rest of the row, filled up with columns that both models exclude
    float tail_x[kStep], tail_y[kStep];
    std::fill(tail_x, tail_x + kStep, -__builtin_inff());
    std::fill(tail_y, tail_y + kStep, -__builtin_inff());
    for (int64_t j = i; j < count; ++j) tail_x[j - i] = widen(x[j]), tail_y[j - i] = widen(y[j]);
    step.template operator()<true>(static_cast<const float*>(tail_x), static_cast<const float*>(tail_y));
    end_run();
  }
  BlockSums sums{sum_of_lanes(run_z),
                 sum_of_lanes(run_u),
                 sum_of_lanes(run_a),
                 sum_of_lanes(run_b),
                 sum_of_lanes(run_h),
                 sum_of_lanes(run_k),
                 false,
                 sum_of_lanes(only_x),
                 sum_of_lanes(only_y)};
  // Not usable if a sum is NaN or infinite (h and k are held by the bounds), or if some t is so large that it has lost
  // digits.
  sums.usable = in_range(seen) && max_of_lanes(top) <= 64.0f && !(sum_of_lanes(extreme) > 0) && finite(sums.z) &&
                finite(sums.u) && finite(sums.a) && finite(sums.b) && sums.h <= kAbove * sums.z &&
                sums.k <= kAbove * sums.u;
  return sums;
}

template <class X>
static inline float block_max(const X* x, int64_t count) {
  Floats top = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) top = max(load(x + i), top);
  float best = max_of_lanes(top);
  for (; i < count; ++i) best = widen(x[i]) > best ? widen(x[i]) : best;
  return best;
}

// m or n is -inf of a model without a column in the block: others may lie far below any reference but their own.
static inline TokenState block_state(const BlockSums& sums, double m, double n) {
  return {m * kLn2,
          n * kLn2,
          sums.z,
          sums.u,
          kLn2 * sums.a,
          kLn2 * sums.b,
          kLn2 * sums.h,
          kLn2 * sums.k,
          -TokenState::infinity(),
          -TokenState::infinity(),
          sums.only_x > 0 ? 1.0 : 0.0,
          sums.only_y > 0 ? 1.0 : 0.0};
}

// The exact, slow way for columns [from, to): double throughout, every special value as token_state.h says.
static inline void push_exactly(TokenState& state, const RowPair& rows, int64_t from, int64_t to,
                                const Natural& scale) {
  constexpr int64_t kPiece = 512;
  double x[kPiece], y[kPiece];
  for (; from < to; from += kPiece) {
    const int64_t count = std::min(kPiece, to - from);
    for (int64_t i = 0; i < count; ++i) x[i] = scaled(rows.x[from + i], scale), y[i] = scaled(rows.y[from + i], scale);
    state.push_block(x, y, count);
  }
}

// The references of a run of blocks, once a block with columns of both models has been seen.
struct References {
  float m = 0, n = 0;
  bool known = false;
};

// One block in float. False if it holds a value beyond float arithmetic (NaN, +inf, an abyss): push it exactly.
template <class X, class Y>
static inline bool push_floats(TokenState& state, References& ref, const Block<X, Y>& block, float scale) {
  if (ref.known) {
    const BlockSums sums = block_sums<false>(block, {scale, ref.m, ref.n});
    if (sums.usable) {
      state.merge(block_state(sums, ref.m, ref.n));
      return true;
    }
  }
  const float none = -__builtin_inff();
  const float top_x = block_max(block.x, block.count) * scale, top_y = block_max(block.y, block.count) * scale;
  // A block that a model excludes altogether has no maximum; any reference serves, and none is kept.
  const float m = top_x == none ? 0 : ref.known ? std::max(ref.m, top_x) : top_x;
  const float n = top_y == none ? 0 : ref.known ? std::max(ref.n, top_y) : top_y;
  if (!(is_reference(m) && is_reference(n))) return false;
  if (top_x != none && top_y != none) ref = {m, n, true};
  BlockSums sums = block_sums<false>(block, {scale, m, n});
  if (!sums.usable) sums = block_sums<true>(block, {scale, m, n});
  if (!sums.usable) return false;
  state.merge(block_state(sums, top_x == none ? none : m, top_y == none ? none : n));
  return true;
}

// Columns [from, to) of a row, folded into a state. Float32 and bfloat16 pairs are read where they lie; other dtypes
// and mixtures are converted a block at a time. `ref`: references to begin with, if any are known.
static inline SegmentState fold_columns(const Logits& in, const RowPair& rows, int64_t from, int64_t to,
                                        References ref) {
  TokenState state = TokenState::empty();
  const Natural natural = natural_scale(in);
  bool exact = is_wide(in);
  if (exact) {
    push_exactly(state, rows, from, to, natural);
    return {state, 1};
  }
  const float scale = scale_of(in.temperature).per_octave;
  const bool brains = rows.are(DType::bfloat16);
  alignas(64) float buffer_x[kBlock], buffer_y[kBlock];
  for (int64_t start = from; start < to; start += kBlock) {
    const int64_t count = std::min(kBlock, to - start);
    bool done;
    if (brains) {
      const auto* x = static_cast<const BFloat16*>(rows.x.data) + start;
      const auto* y = static_cast<const BFloat16*>(rows.y.data) + start;
      done = push_floats(state, ref, Block<BFloat16, BFloat16>{x, y, count}, scale);
    } else {
      const float* x = rows.x.floats(start, count, buffer_x);
      const float* y = rows.y.floats(start, count, buffer_y);
      done = push_floats(state, ref, Block<float, float>{x, y, count}, scale);
    }
    if (!done) push_exactly(state, rows, start, start + count, natural);
    exact = exact || !done;
  }
  return {state, exact ? 1.0 : 0.0};
}

static int64_t segments(int64_t vocab) { return (vocab + kSegment - 1) / kSegment; }

static void fold(const Logits& in, int64_t row, int64_t first, int64_t last, StoredState* states) {
  const RowPair rows(in, row);
  for (int64_t segment = first; segment < last; ++segment) {
    const int64_t from = segment * kSegment, to = std::min(in.vocab, from + kSegment);
    states[segment] = std::bit_cast<StoredState>(fold_columns(in, rows, from, to, {}));
  }
}

static inline void label(TokenState& state, const RowPair& rows, int64_t column, const Natural& scale) {
  state.label(scaled(rows.x[column], scale), scaled(rows.y[column], scale));
}

// The references of earlier columns serve a tile as well as its own maxima would: it is then read once, and merging
// takes no exponentials.
static inline References references_of(const TokenState& state) {
  const float m = static_cast<float>(state.m / kLn2), n = static_cast<float>(state.n / kLn2);
  return {m, n, is_reference(m) && is_reference(n)};
}

static void update(const Logits& in, int64_t row, StoredState& stored) {
  const RowPair rows(in, row);
  auto [state, exact] = std::bit_cast<SegmentState>(stored);
  SegmentState tile = fold_columns(in, rows, 0, in.vocab, references_of(state));
  const int64_t own = own_column(in, row);
  if (own >= 0) label(tile.state, rows, own, natural_scale(in));
  state.merge(tile.state);
  stored = std::bit_cast<StoredState>(SegmentState{state, tile.exact != 0 ? 1.0 : exact});
}

static inline void write_statistics(const TokenStats& stats, const StatsOut& out, int64_t row) {
  const auto values = stats.in_order();
  for (int i = 0; i < kStatistics; ++i) {
    if (out.statistics[i] != nullptr) Numbers{out.statistics[i], out.wide}.set(row, values[i]);
  }
}

static void finish(const Logits& in, int64_t row, const StoredState* states, int64_t count, const StatsOut& out) {
  if (!unmasked(in.mask, row)) {
    write_statistics({}, out, row);
    out.saved[row] = {};
    return;
  }
  TokenState state = TokenState::empty();
  bool exact = false;
  for (int64_t i = 0; i < count; ++i) {
    const auto segment = std::bit_cast<SegmentState>(states[i]);
    state.merge(segment.state);
    exact = exact || segment.exact != 0;
  }
  // Checked before, and again: another thread of the caller may have written to the tokens meanwhile.
  const int64_t own = in.tokens != nullptr ? own_column(in, row) : -1;
  if (own >= 0) label(state, RowPair(in, row), own, natural_scale(in));
  const TokenStats stats = state.finish();
  write_statistics(stats, out, row);
  out.saved[row] = saved_row(state, stats, exact);
}

}  // namespace CMDP_ISA
}  // namespace cmdp
