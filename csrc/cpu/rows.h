// The operations over all rows of a pair of matrices: a variant's kernels, spread over threads.
//
// Rows are independent, and a kernel does the same wherever it runs, so that no result depends on the number of
// threads.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace cmdp::cpu {

constexpr int64_t kWorthAThread = 32768;  // columns; waking a thread costs as much as some ten thousand

// As many threads as the work keeps busy.
inline int useful_threads(int threads, int64_t rows, int64_t width) {
  const int64_t busy = 1 + rows * width / kWorthAThread;
  return static_cast<int>(std::min<int64_t>(threads, busy));
}

// Rows whose work is small are handed out many at a time.
inline int64_t grain_for(int64_t width) { return std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, width)); }

template <class Body>
void for_rows(const Matrix& logits, int threads, const Body& body) {
  parallel_for(logits.rows, useful_threads(threads, logits.rows, logits.width), grain_for(logits.width), body);
}

// Statistics of all rows. When there are fewer rows than threads a row is split: its segments are folded by different
// threads and merged afterwards, in the same order as always.
inline void token_stats(const KernelTable& table, const Logits& in, const StatsOut& out, int threads) {
  const int64_t rows = in.student.rows, segments = table.segments(in.vocab);
  threads = useful_threads(threads, rows, in.vocab);
  if (rows >= threads || segments == 1) {
    parallel_for(rows, threads, grain_for(in.vocab), [&](int64_t row) {
      std::array<StoredState, 64> stack;
      std::unique_ptr<StoredState[]> heap;
      StoredState* states = stack.data();
      if (segments > static_cast<int64_t>(stack.size())) heap.reset(new StoredState[segments]), states = heap.get();
      if (unmasked(in.mask, row)) table.fold(in, row, 0, segments, states);
      table.finish(in, row, states, segments, out);
    });
    return;
  }
  std::vector<StoredState> states(static_cast<size_t>(rows * segments));
  parallel_for(rows * segments, threads, 1, [&](int64_t item) {
    const int64_t row = item / segments, segment = item % segments;
    if (unmasked(in.mask, row)) table.fold(in, row, segment, segment + 1, states.data() + row * segments);
  });
  for (int64_t row = 0; row < rows; ++row) table.finish(in, row, states.data() + row * segments, segments, out);
}

// The gradient of all rows, written to `out`, which may be the student's logits.
inline void token_stats_backward(const KernelTable& table, const Logits& in, const Upstream<double>& upstream,
                                 const SavedRow* saved, const Matrix& out, int threads) {
  for_rows(in.student, threads, [&](int64_t row) { table.backward(in, row, upstream, saved, out); });
}

// The divergence of each row with a mixture, and the number that its gradient needs: [rows] each. 0 of masked rows.
struct MixtureOut {
  double *value, *mean;
};

inline void mixture(const KernelTable& table, const Logits& in, const Mixture& mix, const SavedRow* saved,
                    const MixtureOut& out, int threads) {
  for_rows(in.student, threads, [&](int64_t row) {
    const bool counts = unmasked(in.mask, row);
    const auto [value, mean] = counts ? table.mixture(in, row, mix, saved) : MixtureValue{};
    out.value[row] = value, out.mean[row] = mean;
  });
}

// The arrays that the backward pass of a mixture reads: [rows] each.
struct MixtureUpstream {
  const double *mean, *upstream;
};

inline void mixture_backward(const KernelTable& table, const Logits& in, const Mixture& mix, const SavedRow* saved,
                             const MixtureUpstream& given, const Matrix& out, int threads) {
  for_rows(in.student, threads, [&](int64_t row) {
    table.mixture_backward(in, row, mix, saved, {given.mean[row], given.upstream[row]}, out);
  });
}

// Folds a tile of columns into the states of all rows that the mask lets count.
inline void update_states(const KernelTable& table, const Logits& in, StoredState* states, int threads) {
  for_rows(in.student, threads, [&](int64_t row) {
    if (unmasked(in.mask, row)) table.update(in, row, states[row]);
  });
}

// Folds a tile of columns into the tails of all rows that the mask lets count.
inline void update_tails(const KernelTable& table, const ListedRows& rows, const TailStates& states, int threads) {
  for_rows(rows.in.student, threads, [&](int64_t row) {
    if (unmasked(rows.in.mask, row)) table.update_tail(rows, row, states);
  });
}

inline void tail_backward(const KernelTable& table, const ListedRows& rows, const TailGradient& gradient,
                          const Matrix& out, int threads) {
  for_rows(rows.in.student, threads, [&](int64_t row) { table.tail_backward(rows, row, gradient, out); });
}

}  // namespace cmdp::cpu
