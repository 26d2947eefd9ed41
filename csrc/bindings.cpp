// The Python module cmdp_fast._C. Pointers, shapes and strides come in; nothing here knows about torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "arguments.h"
#include "cpu/kernels.h"
#include "cpu/machine.h"
#include "cpu/rows.h"
#include "cpu/scan.h"
#include "cpu/variants.h"
#include "token_state.h"

namespace py = pybind11;
using namespace cmdp;

namespace {

// For whole rows. A tile may well not hold the token's column.
void check_tokens(const Logits& in) {
  if (in.tokens == nullptr) return;
  for (int64_t row = 0; row < in.student.rows; ++row) {
    if (unmasked(in.mask, row) && own_column(in, row) < 0) fail("tokens: an index is outside the vocabulary");
  }
}

void check_threads(int threads) {
  if (threads < 1) fail("the number of threads must be at least 1");
}

void token_stats(const Matrix& student, const Matrix& teacher, uintptr_t tokens, uintptr_t mask, int64_t vocab,
                 double temperature, const StatisticArgs& statistics, bool wide, uintptr_t saved, int threads) {
  const Logits in = make_logits({student, teacher, tokens, mask, vocab, temperature}, wanted(statistics));
  check_tokens(in);
  const StatsOut out = make_statistics(statistics, wide, saved, student.rows);
  check_threads(threads);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  cpu::token_stats(table, in, out, threads);
}

// `first_column`: nonzero for a tile of wider rows, which `saved` describes; a token whose column lies in another tile
// has none here.
void token_stats_backward(const Matrix& student, const Matrix& teacher, uintptr_t tokens, uintptr_t mask, int64_t vocab,
                          double temperature, const UpstreamArgs& upstream, uintptr_t saved, const Matrix& out,
                          int threads, int64_t first_column) {
  const Logits in = make_logits({student, teacher, tokens, mask, vocab, temperature, first_column}, true);
  check_output(out, student);
  const Upstream<double> gradients = make_upstream<double>(upstream);
  const auto* rows = pointer<const SavedRow>(saved, "saved", student.rows > 0);
  check_threads(threads);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  cpu::token_stats_backward(table, in, gradients, rows, out, threads);
}

Mixture make_mixture(double b, double c_teacher, double c_student) {
  if (!(b > 0 && b < 1)) fail("the mixture's weight must lie strictly between 0 and 1");
  return {b, c_teacher, c_student};
}

void mixture(const Matrix& student, const Matrix& teacher, uintptr_t mask, int64_t vocab, double temperature, double b,
             double c_teacher, double c_student, uintptr_t saved, uintptr_t value, uintptr_t mean, int threads) {
  const Logits in = make_logits({student, teacher, 0, mask, vocab, temperature}, false);
  const Mixture mix = make_mixture(b, c_teacher, c_student);
  const bool any = student.rows > 0;
  const auto* rows = pointer<const SavedRow>(saved, "saved", any);
  const cpu::MixtureOut out{pointer<double>(value, "value", any), pointer<double>(mean, "mean", any)};
  check_threads(threads);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  cpu::mixture(table, in, mix, rows, out, threads);
}

void mixture_backward(const Matrix& student, const Matrix& teacher, uintptr_t mask, int64_t vocab, double temperature,
                      double b, double c_teacher, double c_student, uintptr_t saved, uintptr_t mean, uintptr_t upstream,
                      const Matrix& out, int threads) {
  const Logits in = make_logits({student, teacher, 0, mask, vocab, temperature}, false);
  const Mixture mix = make_mixture(b, c_teacher, c_student);
  check_output(out, student);
  const bool any = student.rows > 0;
  const auto* rows = pointer<const SavedRow>(saved, "saved", any);
  const cpu::MixtureUpstream given{pointer<const double>(mean, "mean", any),
                                   pointer<const double>(upstream, "upstream", any)};
  check_threads(threads);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  cpu::mixture_backward(table, in, mix, rows, given, out, threads);
}

// Folds a tile of columns [first_column, first_column + width) into the states of all rows that the mask lets count.
void update_states(const Matrix& student, const Matrix& teacher, uintptr_t tokens, int64_t first_column,
                   double temperature, uintptr_t states, int threads, uintptr_t mask) {
  if (student.width == 0) return;
  const Logits in = make_logits({student, teacher, tokens, mask, student.width, temperature, first_column}, true);
  if (teacher.width != student.width) fail("the tiles of student and teacher have different widths");
  auto* stored = pointer<StoredState>(states, "states", student.rows > 0);
  check_threads(threads);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  cpu::update_states(table, in, stored, threads);
}

// Folds a tile of columns [first_column, first_column + vocab) into the tails of all rows that the mask lets count.
void update_tails(const Matrix& student, uintptr_t ids, int64_t listed, uintptr_t tokens, uintptr_t mask, int64_t vocab,
                  double temperature, int64_t first_column, const TailStateArgs& states, int threads) {
  const ListedRows rows = make_listed({student, student, tokens, mask, vocab, temperature, first_column}, ids, listed);
  const TailStates tails = make_tails(states, rows);
  check_threads(threads);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  cpu::update_tails(table, rows, tails, threads);
}

void tail_backward(const Matrix& student, uintptr_t ids, int64_t listed, uintptr_t tokens, uintptr_t mask,
                   int64_t vocab, double temperature, int64_t first_column, const TailGradientArgs& gradient,
                   const Matrix& out, int threads) {
  const ListedRows rows = make_listed({student, student, tokens, mask, vocab, temperature, first_column}, ids, listed);
  check_output(out, student);
  const TailGradient numbers = make_tail_gradient(gradient, rows);
  check_threads(threads);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  cpu::tail_backward(table, rows, numbers, out, threads);
}

// Checks that the offsets rise from 0 to total, so that no sequence reaches outside the arrays. Without offsets the
// sequences are of equal length.
Sequences make_sequences(uintptr_t offsets, int64_t count, int64_t total, uintptr_t mask) {
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

void budget_trace(uintptr_t cost, bool wide, uintptr_t mask, uintptr_t offsets, int64_t count, int64_t total,
                  const std::variant<uintptr_t, double>& limits, const BudgetArgs& budget, const TraceArgs& trace,
                  const std::optional<RewardArgs>& reward, uintptr_t task_reward, uintptr_t result, int threads) {
  const Sequences sequences = make_sequences(offsets, count, total, mask);
  const Numbers costs = make_numbers(cost, wide, "cost", total > 0);
  const auto* number = std::get_if<double>(&limits);
  const auto* own = number ? nullptr : pointer<const double>(std::get<uintptr_t>(limits), "limits", count > 0);
  const TraceArrays out = make_trace(trace, wide, total, count);
  const RewardArrays rewards = make_rewards(task_reward, result, wide, reward.has_value() && total > 0);
  const auto modified = reward ? std::optional<Reward>({make_rule(*reward), rewards}) : std::nullopt;
  const Spending spending{costs, own, number ? *number : 0, make_rule(budget)};
  check_threads(threads);
  py::gil_scoped_release release;
  trace_budgets(sequences, spending, out, modified ? &*modified : nullptr, threads);
}

void modified_reward(uintptr_t task_reward, uintptr_t cost, bool wide, uintptr_t mask, uintptr_t offsets, int64_t count,
                     int64_t total, const std::array<uintptr_t, 4>& trace, const RewardArgs& reward, uintptr_t result) {
  const Sequences sequences = make_sequences(offsets, count, total, mask);
  const Numbers costs = make_numbers(cost, wide, "cost", total > 0);
  const RewardArrays rewards = make_rewards(task_reward, result, wide, total > 0);
  const auto [cumulative, remaining, violated, excess] = trace;
  const TraceArrays given = make_trace({cumulative, remaining, violated, 0, excess}, wide, total, 0);
  const Reward modified{make_rule(reward), rewards};
  py::gil_scoped_release release;
  modify_rewards(sequences, costs, given, modified);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of cmdp_fast: pointers, shapes and strides in, no framework.";

  py::class_<Matrix>(module, "Matrix", "Rows of logits at an address: leading sizes and strides in elements.")
      .def(py::init(&make_matrix), py::arg("address"), py::arg("dtype"), py::arg("sizes"), py::arg("strides"),
           py::arg("width"))
      .def_readonly("rows", &Matrix::rows)
      .def_readonly("width", &Matrix::width);

  // The state's algebra itself, for tests and for readers.
  py::class_<TokenState>(module, "TokenState", "The mergeable state of one token (csrc/token_state.h).")
      .def(py::init(&TokenState::empty))
      .def("push", &TokenState::push)
      .def("push_block",
           [](TokenState& state, const std::vector<double>& x, const std::vector<double>& y) {
             if (x.size() != y.size()) fail("push_block needs as many columns of the student as of the teacher");
             state.push_block(x.data(), y.data(), static_cast<int64_t>(x.size()));
           })
      .def("label", &TokenState::label)
      .def("raise_to", &TokenState::raise)
      .def("merge", &TokenState::merge)
      .def("finish", [](const TokenState& state) { return state.finish().in_order(); })
      .def("fields", [](const TokenState& s) {
        return std::array<double, TokenState::kFields>{s.m, s.n, s.z,  s.u,  s.a,     s.b,
                                                       s.h, s.k, s.xa, s.ya, s.r_inf, s.f_inf};
      });

  module.attr("SAVED") = kSaved;
  module.attr("STATE") = StoredState::kNumbers;
  module.def("token_stats", &token_stats);
  module.def("token_stats_backward", &token_stats_backward, py::arg("student"), py::arg("teacher"), py::arg("tokens"),
             py::arg("mask"), py::arg("vocab"), py::arg("temperature"), py::arg("upstream"), py::arg("saved"),
             py::arg("out"), py::arg("threads"), py::arg("first_column") = 0);
  module.def("mixture", &mixture);
  module.def("mixture_backward", &mixture_backward);
  module.def("update_states", &update_states, py::arg("student"), py::arg("teacher"), py::arg("tokens"),
             py::arg("first_column"), py::arg("temperature"), py::arg("states"), py::arg("threads"),
             py::arg("mask") = 0);
  module.def("update_tails", &update_tails);
  module.def("tail_backward", &tail_backward);
  module.def("budget_trace", &budget_trace);
  module.def("modified_reward", &modified_reward);

  module.def("advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("bytes"));
  module.def("variants", [] {
    std::vector<std::pair<std::string, bool>> all;
    for (const Variant& variant : variants()) all.emplace_back(variant.table->name, variant.supported);
    return all;
  });
  module.def("variant", [] { return std::string(kernels().name); });
  module.def("set_variant", [](const std::string& name) { active_variant = variant_named(name); });
  module.def("cpu_features", &cpu_features);
  module.attr("SOURCES") = CMDP_SOURCES;      // a hash of the files that it was built from
  module.attr("CUDA_NOTE") = CMDP_CUDA_NOTE;  // why cmdp_fast._cuda was not built with it; empty if it was
#ifdef _OPENMP
  module.attr("OPENMP") = true;
#else
  module.attr("OPENMP") = false;
#endif
}
