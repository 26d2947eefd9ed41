// The calls of the module: arguments come as plain numbers, are checked, and the kernels run. No Python: bindings.cpp
// offers these to it, and tests/csrc/emulated.cpp to a process on another architecture.
#pragma once

#include <optional>
#include <variant>

#include "arguments.h"
#include "cpu/kernels.h"
#include "cpu/rows.h"
#include "cpu/scan.h"
#include "cpu/variants.h"

namespace cmdp::calls {

// For whole rows. A tile may well not hold the token's column.
inline void check_tokens(const Logits& in) {
  if (in.tokens == nullptr) return;
  for (int64_t row = 0; row < in.student.rows; ++row) {
    if (unmasked(in.mask, row) && own_column(in, row) < 0) fail("tokens: an index is outside the vocabulary");
  }
}

inline void check_threads(int threads) {
  if (threads < 1) fail("the number of threads must be at least 1");
}

inline void token_stats(const Matrix& student, const Matrix& teacher, uintptr_t tokens, uintptr_t mask, int64_t vocab,
                        double temperature, const StatisticArgs& statistics, bool wide, uintptr_t saved, int threads) {
  const Logits in = make_logits({student, teacher, tokens, mask, vocab, temperature}, wanted(statistics));
  const StatsOut out = make_statistics(statistics, wide, saved, student.rows);
  check_threads(threads);
  check_tokens(in);
  const KernelTable& table = kernels();
  cpu::token_stats(table, in, out, threads);
}

// `first_column`: nonzero for a tile of wider rows, which `saved` describes; a token whose column lies in another tile
// has none here.
inline void token_stats_backward(const Matrix& student, const Matrix& teacher, uintptr_t tokens, uintptr_t mask,
                                 int64_t vocab, double temperature, const UpstreamArgs& upstream, uintptr_t saved,
                                 const Matrix& out, int threads, int64_t first_column) {
  const Logits in = make_logits({student, teacher, tokens, mask, vocab, temperature, first_column}, true);
  check_output(out, student);
  const Upstream<double> gradients = make_upstream<double>(upstream);
  const auto* rows = pointer<const SavedRow>(saved, "saved", student.rows > 0);
  check_threads(threads);
  const KernelTable& table = kernels();
  cpu::token_stats_backward(table, in, gradients, rows, out, threads);
}

inline Mixture make_mixture(double b, double c_teacher, double c_student) {
  if (!(b > 0 && b < 1)) fail("the mixture's weight must lie strictly between 0 and 1");
  return {b, c_teacher, c_student};
}

inline void mixture(const Matrix& student, const Matrix& teacher, uintptr_t mask, int64_t vocab, double temperature,
                    double b, double c_teacher, double c_student, uintptr_t saved, uintptr_t value, uintptr_t mean,
                    int threads) {
  const Logits in = make_logits({student, teacher, 0, mask, vocab, temperature}, false);
  const Mixture mix = make_mixture(b, c_teacher, c_student);
  const bool any = student.rows > 0;
  const auto* rows = pointer<const SavedRow>(saved, "saved", any);
  const cpu::MixtureOut out{pointer<double>(value, "value", any), pointer<double>(mean, "mean", any)};
  check_threads(threads);
  const KernelTable& table = kernels();
  cpu::mixture(table, in, mix, rows, out, threads);
}

inline void mixture_backward(const Matrix& student, const Matrix& teacher, uintptr_t mask, int64_t vocab,
                             double temperature, double b, double c_teacher, double c_student, uintptr_t saved,
                             uintptr_t mean, uintptr_t upstream, const Matrix& out, int threads) {
  const Logits in = make_logits({student, teacher, 0, mask, vocab, temperature}, false);
  const Mixture mix = make_mixture(b, c_teacher, c_student);
  check_output(out, student);
  const bool any = student.rows > 0;
  const auto* rows = pointer<const SavedRow>(saved, "saved", any);
  const cpu::MixtureUpstream given{pointer<const double>(mean, "mean", any),
                                   pointer<const double>(upstream, "upstream", any)};
  check_threads(threads);
  const KernelTable& table = kernels();
  cpu::mixture_backward(table, in, mix, rows, given, out, threads);
}

// Folds a tile of columns [first_column, first_column + width) into the states of all rows that the mask lets count.
inline void update_states(const Matrix& student, const Matrix& teacher, uintptr_t tokens, int64_t first_column,
                          double temperature, uintptr_t states, int threads, uintptr_t mask) {
  if (student.width == 0) return;
  const Logits in = make_logits({student, teacher, tokens, mask, student.width, temperature, first_column}, true);
  if (teacher.width != student.width) fail("the tiles of student and teacher have different widths");
  auto* stored = pointer<StoredState>(states, "states", student.rows > 0);
  check_threads(threads);
  const KernelTable& table = kernels();
  cpu::update_states(table, in, stored, threads);
}

// Folds a tile of columns [first_column, first_column + vocab) into the tails of all rows that the mask lets count.
inline void update_tails(const Matrix& student, uintptr_t ids, int64_t listed, uintptr_t tokens, uintptr_t mask,
                         int64_t vocab, double temperature, int64_t first_column, const TailStateArgs& states,
                         int threads) {
  const ListedRows rows = make_listed({student, student, tokens, mask, vocab, temperature, first_column}, ids, listed);
  const TailStates tails = make_tails(states, rows);
  check_threads(threads);
  const KernelTable& table = kernels();
  cpu::update_tails(table, rows, tails, threads);
}

inline void tail_backward(const Matrix& student, uintptr_t ids, int64_t listed, uintptr_t tokens, uintptr_t mask,
                          int64_t vocab, double temperature, int64_t first_column, const TailGradientArgs& gradient,
                          const Matrix& out, int threads) {
  const ListedRows rows = make_listed({student, student, tokens, mask, vocab, temperature, first_column}, ids, listed);
  check_output(out, student);
  const TailGradient numbers = make_tail_gradient(gradient, rows);
  check_threads(threads);
  const KernelTable& table = kernels();
  cpu::tail_backward(table, rows, numbers, out, threads);
}

// Checks that the offsets rise from 0 to total, so that no sequence reaches outside the arrays. Without offsets the
// sequences are of equal length.
inline Sequences make_sequences(uintptr_t offsets, int64_t count, int64_t total, uintptr_t mask) {
  if (count < 0 || total < 0) fail("negative sizes");
  const auto* begins = pointer<const int64_t>(offsets, "offsets", false);
  if (begins == nullptr) {
    const int64_t width = count > 0 ? total / count : 0;
    if (count * width != total) fail("without offsets all sequences must have the same number of tokens");
    return {nullptr, count, width, pointer<const uint8_t>(mask, "mask", false)};
  }
  if (begins[0] != 0 || begins[count] != total) fail("offsets must begin with 0 and end with the number of tokens");
  for (int64_t i = 0; i < count; ++i) {
    if (begins[i + 1] < begins[i]) fail("offsets must not decrease");
  }
  return {begins, count, 0, pointer<const uint8_t>(mask, "mask", false)};
}

inline void budget_trace(uintptr_t cost, bool wide, uintptr_t mask, uintptr_t offsets, int64_t count, int64_t total,
                         const std::variant<uintptr_t, double>& limits, const BudgetArgs& budget,
                         const TraceArgs& trace, const std::optional<RewardArgs>& reward, uintptr_t task_reward,
                         uintptr_t result, int threads) {
  const Sequences sequences = make_sequences(offsets, count, total, mask);
  const Numbers costs = make_numbers(cost, wide, "cost", total > 0);
  const auto* number = std::get_if<double>(&limits);
  const auto* own = number ? nullptr : pointer<const double>(std::get<uintptr_t>(limits), "limits", count > 0);
  const TraceArrays out = make_trace(trace, wide, total, count);
  const RewardArrays rewards = make_rewards(task_reward, result, wide, reward.has_value() && total > 0);
  const auto modified = reward ? std::optional<Reward>({make_rule(*reward), rewards}) : std::nullopt;
  const Spending spending{costs, own, number ? *number : 0, make_rule(budget)};
  check_threads(threads);
  trace_budgets(sequences, spending, out, modified ? &*modified : nullptr, threads);
}

inline void modified_reward(uintptr_t task_reward, uintptr_t cost, bool wide, uintptr_t mask, uintptr_t offsets,
                            int64_t count, int64_t total, const std::array<uintptr_t, 4>& trace,
                            const RewardArgs& reward, uintptr_t result) {
  const Sequences sequences = make_sequences(offsets, count, total, mask);
  const Numbers costs = make_numbers(cost, wide, "cost", total > 0);
  const RewardArrays rewards = make_rewards(task_reward, result, wide, total > 0);
  const auto [cumulative, remaining, violated, excess] = trace;
  const TraceArrays given = make_trace({cumulative, remaining, violated, 0, excess}, wide, total, 0);
  const Reward modified{make_rule(reward), rewards};
  modify_rewards(sequences, costs, given, modified);
}

}  // namespace cmdp::calls
