// The arguments of both Python modules: from Python's numbers to pointers, matrices, arrays and rules. Every argument
// is checked before it is used: a wrong call raises, it does not read a stray address.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "arrays.h"
#include "budget.h"
#include "logits.h"
#include "tail.h"

namespace cmdp {

[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message); }

template <class T>
T* pointer(uintptr_t address, const char* name, bool needed) {
  if (address == 0 && needed) fail(std::string(name) + " is a null pointer");
  if (address % alignof(T) != 0) fail(std::string(name) + " is not aligned to its element size");
  return reinterpret_cast<T*>(address);
}

inline DType dtype_named(const std::string& name, int& size) {
  size = name == "float64" ? 8 : name == "float32" ? 4 : 2;
  if (name == "float32") return DType::float32;
  if (name == "bfloat16") return DType::bfloat16;
  if (name == "float16") return DType::float16;
  if (name == "float64") return DType::float64;
  fail("dtype '" + name + "' is not one of float32, bfloat16, float16, float64");
}

inline Matrix make_matrix(uintptr_t address, const std::string& dtype, const std::vector<int64_t>& sizes,
                          const std::vector<int64_t>& strides, int64_t width) {
  Matrix matrix{};
  matrix.dtype = dtype_named(dtype, matrix.element_size);
  if (sizes.size() != strides.size()) fail("a matrix needs as many strides as leading sizes");
  if (sizes.size() > Matrix::kMaxDims) fail("a matrix may have at most 8 leading dimensions");
  if (width < 0) fail("a matrix has a negative width");
  matrix.dims = static_cast<int>(sizes.size());
  matrix.width = width;
  matrix.rows = 1;
  int64_t reach = width;
  for (int d = 0; d < matrix.dims; ++d) {
    if (sizes[d] < 0 || strides[d] < 0) fail("a matrix has a negative size or stride");
    matrix.sizes[d] = sizes[d];
    matrix.strides[d] = strides[d];
    int64_t extent = 0;
    if (__builtin_mul_overflow(matrix.rows, sizes[d], &matrix.rows) ||
        __builtin_mul_overflow(sizes[d] > 0 ? sizes[d] - 1 : 0, strides[d], &extent) ||
        __builtin_add_overflow(reach, extent, &reach)) {
      fail("the size of a matrix overflows 64 bits");
    }
  }
  int64_t bytes = 0, entries = 0;  // more than bytes where rows share memory
  if (__builtin_mul_overflow(reach, int64_t{matrix.element_size}, &bytes) ||
      __builtin_mul_overflow(matrix.rows, width, &entries)) {
    fail("the size of a matrix overflows 64 bits");
  }
  if (address == 0 && matrix.rows > 0 && width > 0) fail("a matrix has a null pointer");
  if (address % matrix.element_size != 0) fail("a matrix is not aligned to its element size");
  matrix.data = reinterpret_cast<char*>(address);
  return matrix;
}

// As in Logits.
struct LogitsArgs {
  const Matrix &student, &teacher;
  uintptr_t tokens, mask;
  int64_t vocab;
  double temperature;
  int64_t first_column = 0;
};

inline Logits make_logits(const LogitsArgs& args, bool needs_tokens) {
  const auto& [student, teacher, tokens, mask, vocab, temperature, first_column] = args;
  if (student.rows != teacher.rows) fail("student and teacher have different numbers of rows");
  if (vocab < 1 || vocab > student.width || vocab > teacher.width) fail("vocab is outside the width of the logits");
  if (!(temperature > 0)) fail("the temperature must be positive");
  if (first_column < 0) fail("first_column is negative");
  int64_t end = 0;
  if (__builtin_add_overflow(first_column, vocab, &end)) fail("the last column overflows 64 bits");
  const bool needed = needs_tokens && student.rows > 0;
  return {student,
          teacher,
          pointer<const int64_t>(tokens, "tokens", needed),
          pointer<const uint8_t>(mask, "mask", false),
          vocab,
          temperature,
          first_column};
}

inline ListedRows make_listed(const LogitsArgs& args, uintptr_t ids, int64_t listed) {
  const Logits in = make_logits(args, true);
  int64_t entries = 0, bytes = 0;
  if (listed < 0 || __builtin_mul_overflow(in.student.rows, listed, &entries) ||
      __builtin_mul_overflow(entries, int64_t{sizeof(int64_t)}, &bytes)) {
    fail("the number of ids is impossible");
  }
  return {in, pointer<const int64_t>(ids, "ids", entries > 0), listed};
}

using TailStateArgs = std::array<uintptr_t, 3>;  // as in TailStates

inline TailStates make_tails(const TailStateArgs& args, const ListedRows& rows) {
  const bool any = rows.in.student.rows > 0;
  const auto [fields, listed, own] = args;
  return {pointer<TailFields>(fields, "fields", any), pointer<double>(listed, "listed", any && rows.listed > 0),
          pointer<double>(own, "own", any)};
}

using TailGradientArgs = std::array<uintptr_t, 6>;  // as in TailGradient

inline TailGradient make_tail_gradient(const TailGradientArgs& args, const ListedRows& rows) {
  const auto at = [](uintptr_t address, bool needed) {
    return pointer<const double>(address, "a number of the gradient", needed);
  };
  const bool any = rows.in.student.rows > 0;
  const auto [reference, log_mass, constant, slope, own, listed] = args;
  return {at(reference, any), at(log_mass, any), at(constant, any),
          at(slope, any),     at(own, any),      at(listed, any && rows.listed > 0)};
}

// An address per statistic, in the order of Statistic; all null if only the saved rows are wanted.
using StatisticArgs = std::array<uintptr_t, kStatistics>;

inline bool wanted(const StatisticArgs& statistics) { return statistics[kLogprob] != 0; }

inline StatsOut make_statistics(const StatisticArgs& statistics, bool wide, uintptr_t saved, int64_t rows) {
  const bool any = rows > 0, needed = any && wanted(statistics);
  StatsOut out{{}, wide, pointer<SavedRow>(saved, "saved", any)};
  for (int i = 0; i < kStatistics; ++i) {
    out.statistics[i] = wide ? static_cast<void*>(pointer<double>(statistics[i], "a statistic", needed))
                             : static_cast<void*>(pointer<float>(statistics[i], "a statistic", needed));
  }
  return out;
}

using UpstreamArgs = std::array<uintptr_t, 4>;  // as in Upstream

template <class Real>
Upstream<Real> make_upstream(const UpstreamArgs& args) {
  const auto at = [](uintptr_t address) { return pointer<const Real>(address, "an upstream gradient", false); };
  const auto [logprob, entropy, reverse_kl, forward_kl] = args;
  return {at(logprob), at(entropy), at(reverse_kl), at(forward_kl)};
}

inline void check_output(const Matrix& out, const Matrix& student) {
  if (out.rows != student.rows || out.width != student.width || out.dtype != student.dtype) {
    fail("the gradient must have the rows, width and dtype of the student's logits");
  }
}

inline Numbers make_numbers(uintptr_t address, bool wide, const char* name, bool needed) {
  if (wide) return {pointer<double>(address, name, needed), true};
  return {pointer<float>(address, name, needed), false};
}

using TraceArgs = std::array<uintptr_t, 5>;  // cumulative, remaining, violated, first_violation, excess

// `sequences`: for how many first_violation is needed.
inline TraceArrays make_trace(const TraceArgs& args, bool wide, int64_t tokens, int64_t sequences) {
  const auto [cumulative, remaining, violated, first_violation, excess] = args;
  const bool any = tokens > 0;
  return {make_numbers(cumulative, wide, "cumulative", any), make_numbers(remaining, wide, "remaining", any),
          make_numbers(excess, wide, "excess", any), pointer<uint8_t>(violated, "violated", any),
          pointer<int64_t>(first_violation, "first_violation", sequences > 0)};
}

inline RewardArrays make_rewards(uintptr_t task_reward, uintptr_t reward, bool wide, bool needed) {
  return {make_numbers(task_reward, wide, "task_reward", needed), make_numbers(reward, wide, "reward", needed)};
}

inline RewardKind reward_kind(const std::string& kind) {
  if (kind == "cmdp") return RewardKind::cmdp;
  if (kind == "hinge") return RewardKind::hinge;
  if (kind == "saute" || kind == "worst_case") return RewardKind::saute;
  if (kind == "lagrangian" || kind == "pid") return RewardKind::lagrangian;
  if (kind == "barrier") return RewardKind::barrier;
  fail("reward kind '" + kind + "' is unknown");
}

using BudgetArgs = std::tuple<double, bool, bool>;                                 // gamma, mean, inclusive
using RewardArgs = std::tuple<std::string, bool, double, double, double, double>;  // as in RewardRule

inline BudgetRule make_rule(const BudgetArgs& args) {
  const auto& [gamma, mean, inclusive] = args;
  return {gamma, mean, inclusive};
}

inline RewardRule make_rule(const RewardArgs& args) {
  const auto& [kind, at_crossing, penalty, discrepancy_weight, coefficient, barrier_slope] = args;
  return {reward_kind(kind), at_crossing, penalty, discrepancy_weight, coefficient, barrier_slope};
}

}  // namespace cmdp
