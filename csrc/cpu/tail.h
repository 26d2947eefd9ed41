// The tail of a row (../tail.h): its state, folded a block of columns at a time, and the gradient of its logits.
//
// Blocks and arithmetic are those of forward.h, of one model: t = L x - M in powers of two, one fused multiply-add, and
// z += 2^t, h += 2^t t in float, in double across blocks. The reference M is the maximum of the block, for which the
// block is read twice, the second time from the L1 cache. A block with listed columns is copied, and holds -inf there
// (+inf while its least column is looked for).
#pragma once

#include "../tail.h"
#include "backward.h"

namespace cmdp {
inline namespace CMDP_ISA {

struct Extremes {
  float low, top;
};

// NaNs are passed over.
static inline Extremes extremes(const float* x, int64_t count) {
  Floats top = splat(-__builtin_inff()), negative = top;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    top = max(load(x + i), top);
    negative = max(-load(x + i), negative);
  }
  Extremes found{-max_of_lanes(negative), max_of_lanes(top)};
  for (; i < count; ++i) {
    found.top = x[i] > found.top ? x[i] : found.top;
    found.low = x[i] < found.low ? x[i] : found.low;
  }
  return found;
}

struct TailSums {
  float z, h;
};

// A column of -inf weighs nothing, and neither do those 127 octaves below the reference. A NaN makes h one.
static inline TailSums tail_sums(const float* x, int64_t count, float scale, float m) {
  Floats z{}, h{}, run_z{}, run_h{};
  const Floats factor = splat(scale), minus_m = splat(-m), bottom = splat(-1e30f);
  const auto step = [&](const float* xs) {
    const Floats t = max_or_nan(bottom, multiply_add(load(xs), factor, minus_m));
    const Floats weight = exp2(t);
    z += weight;
    h += weight * t;
  };
  int64_t i = 0;
  while (i + kLanes <= count) {
    for (const int64_t end = std::min(i + kRun, count); i + kLanes <= end; i += kLanes) step(x + i);
    run_z += z, run_h += h;
    z = h = Floats{};
  }
  if (i < count) {
    float rest[kLanes];
    std::fill(rest, rest + kLanes, -__builtin_inff());
    std::copy(x + i, x + count, rest);
    step(rest);
  }
  return {sum_of_lanes(run_z + z), sum_of_lanes(run_h + h)};
}

// The listed columns of a row that lie in a tile, and where the next one is.
class Listed {
 public:
  Listed(const ListedRows& rows, int64_t row)
      : ids_(rows.ids + row * rows.listed), count_(rows.listed), first_(rows.in.first_column), vocab_(rows.in.vocab) {}

  // body(j, column): number j of the list, which lies in the tile's column.
  template <class Body>
  void each(const Body& body) const {
    for (int64_t j = 0; j < count_; ++j) {
      if (ids_[j] >= first_ && ids_[j] - first_ < vocab_) body(j, ids_[j] - first_);
    }
  }

  // The same of columns below `end`, from where the last call stopped: ids ascend.
  template <class Body>
  void below(int64_t end, const Body& body) {
    for (; next_ < count_ && ids_[next_] < first_ + end; ++next_) {
      if (ids_[next_] >= first_) body(ids_[next_] - first_);
    }
  }

 private:
  const int64_t* ids_;
  int64_t count_, first_, vocab_, next_ = 0;
};

// The listed columns of a block, counted from its first.
struct Gone {
  int32_t at[kBlock];
  int64_t count;

  template <class Real>
  void write(Real* values, Real value) const {
    for (int64_t i = 0; i < count; ++i) values[at[i]] = value;
  }
};

// The exact, slow way for the columns x[0..count) of a block: double throughout. Overwrites listed ones.
static inline TailFields exact_tail(double* x, int64_t count, const Natural& scale, const Gone& gone) {
  const double inf = TokenState::infinity();
  TailFields block{-inf, 0, 0, inf};
  gone.write(x, inf);
  for (int64_t i = 0; i < count; ++i) block.low = x[i] < block.low ? x[i] : block.low;
  gone.write(x, -inf);
  for (int64_t i = 0; i < count; ++i) {
    x[i] = scaled(x[i], scale);
    if (x[i] > block.m && x[i] < inf) block.m = x[i];
  }
  for (int64_t i = 0; i < count; ++i) {
    if (x[i] == -inf) continue;
    const double t = x[i] - block.m, weight = std::exp(t);
    block.z += weight;
    if (weight != 0) block.h += weight * t;  // 0 * infinity = 0; true of a NaN
  }
  return block;
}

static void update_tail(const ListedRows& rows, int64_t row, const TailStates& states) {
  const Logits& in = rows.in;
  const Row x = RowPair(in, row).x;
  const Natural natural = natural_scale(in);
  Listed listed(rows, row);
  listed.each([&](int64_t j, int64_t column) { states.listed[row * rows.listed + j] = scaled(x[column], natural); });
  const int64_t own = own_column(in, row);
  if (own >= 0) states.own[row] = scaled(x[own], natural);

  const bool wide = is_wide(in);
  const float scale = scale_of(in.temperature).per_octave;
  TailFields state = states.fields[row];
  alignas(64) float buffer[kBlock];
  double doubles[kBlock];
  Gone gone;
  for (int64_t start = 0; start < in.vocab; start += kBlock) {
    const int64_t count = std::min(kBlock, in.vocab - start);
    gone.count = 0;
    listed.below(start + count, [&](int64_t column) {
      // Ids that do not ascend, or come again, make a wrong result and no harm.
      if (column >= start && gone.count < kBlock) gone.at[gone.count++] = static_cast<int32_t>(column - start);
    });
    if (gone.count >= count) continue;
    TailFields block{};
    bool done = false;
    if (wide) {
      for (int64_t i = 0; i < count; ++i) doubles[i] = x[start + i];
    } else {
      const float* values = x.floats(start, count, buffer);
      float low = __builtin_inff();
      if (gone.count > 0) {
        if (values != buffer) std::copy(values, values + count, buffer);
        values = buffer;
        gone.write(buffer, __builtin_inff());
        low = extremes(values, count).low;
        gone.write(buffer, -__builtin_inff());
      }
      const auto [lowest, top] = extremes(values, count);
      const float m = top * scale;
      if (is_reference(m)) {
        const TailSums sums = tail_sums(values, count, scale, m);
        block = {m * kLn2, sums.z, kLn2 * sums.h, gone.count > 0 ? low : lowest};
        done = sums.z > 0 && finite(sums.z) && finite(sums.h);
      }
      if (!done) std::copy(values, values + count, doubles);
    }
    if (!done) block = exact_tail(doubles, count, natural, gone);
    if (finite(block.low)) block.low = scaled(block.low, natural);
    merge(state, block);
  }
  states.fields[row] = state;
}

static inline bool all_zero(const double* values, int64_t count) {
  return std::all_of(values, values + count, [](double value) { return value == 0; });
}

static void tail_backward(const ListedRows& rows, int64_t row, const TailGradient& gradient, const Matrix& out) {
  const Logits& in = rows.in;
  const OutRow to{row_of(out, row), out.dtype};
  const double* given = gradient.listed + row * rows.listed;
  const double constant = gradient.constant[row], slope = gradient.slope[row], share = gradient.own[row];
  const bool unread = constant == 0 && slope == 0 && share == 0 && all_zero(given, rows.listed);
  if (unread || !unmasked(in.mask, row)) {
    zero_columns(out, to.data, 0);
    return;
  }
  const RowPair pair(in, row);
  const TailColumn column{gradient.reference[row], gradient.log_mass[row], constant, slope, natural_scale(in)};
  const int64_t token = own_column(in, row);
  // Before anything is written: the output may be the logits themselves.
  const double own = token >= 0 ? column(pair.x[token]) + share : 0;

  const TailSlopes slopes(column);
  const float per_octave = scale_of(in.temperature).per_octave;
  if (column.log_mass == -TokenState::infinity()) {
    zero_columns(out, to.data, 0);
  } else if (!is_wide(in) && slopes.modest) {
    map_blocks(pair, in.vocab, false, to, [&](const Block<float, float>& block, float* dx) {
      const Floats factor = splat(per_octave), minus_m = splat(-slopes.m), lowest = splat(kWeightless);
      const auto step = [&](const float* from, float* lanes) {
        const Floats t = max(multiply_add(load(from), factor, minus_m), lowest);
        store(lanes, exp2(t) * (t * slopes.per_t + slopes.at_zero));
      };
      int64_t i = 0;
      for (; i + kLanes <= block.count; i += kLanes) step(block.x + i, dx + i);
      if (i < block.count) {
        float from[kLanes] = {}, lanes[kLanes];
        std::copy(block.x + i, block.x + block.count, from);
        step(from, lanes);
        std::copy(lanes, lanes + (block.count - i), dx + i);
      }
    });
  } else {
    for (int64_t i = 0; i < in.vocab; ++i) to.set(i, column(pair.x[i]));
  }
  if (token >= 0) to.set(token, own);
  Listed(rows, row).each([&](int64_t j, int64_t i) { to.set(i, given[j]); });
  zero_columns(out, to.data, in.vocab);
}

}  // namespace CMDP_ISA
}  // namespace cmdp
