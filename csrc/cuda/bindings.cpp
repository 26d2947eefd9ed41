// The Python module cmdp_fast._cuda: addresses of device memory, shapes, strides and a stream come in, kernels are
// launched. Nothing here knows about torch. cmdp_fast/cuda.py calls it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "../arguments.h"
#include "launch.h"

namespace py = pybind11;
using namespace cmdp;

namespace {

// A launcher returns a message about its problem, or nothing.
void check(const char* problem) {
  if (problem != nullptr) throw std::runtime_error(problem);
}

void* stream_at(uintptr_t stream) { return reinterpret_cast<void*>(stream); }

cuda::Scratch make_scratch(uintptr_t partial, uintptr_t arrived, int64_t rows) {
  return {pointer<cuda::PartialState>(partial, "partial", rows > 0), pointer<uint32_t>(arrived, "arrived", rows > 0)};
}

void token_stats(const Matrix& student, const Matrix& teacher, uintptr_t tokens, uintptr_t mask, int64_t vocab,
                 double temperature, const StatisticArgs& statistics, uintptr_t saved, uintptr_t partial,
                 uintptr_t arrived, uintptr_t stream) {
  const Logits in = make_logits({student, teacher, tokens, mask, vocab, temperature}, wanted(statistics));
  const StatsOut out = make_statistics(statistics, false, saved, student.rows);
  const cuda::Scratch scratch = make_scratch(partial, arrived, student.rows);
  const py::gil_scoped_release release;
  check(cuda::token_stats(in, out, scratch, stream_at(stream)));
}

void token_stats_backward(const Matrix& student, const Matrix& teacher, uintptr_t tokens, uintptr_t mask, int64_t vocab,
                          double temperature, const UpstreamArgs& upstream, uintptr_t saved, const Matrix& out,
                          int64_t first_column, uintptr_t stream) {
  const bool needs_tokens = upstream.front() != 0;  // logprob's
  const Logits in = make_logits({student, teacher, tokens, mask, vocab, temperature, first_column}, needs_tokens);
  check_output(out, student);
  const Upstream<float> gradients = make_upstream<float>(upstream);
  const auto* rows = pointer<const SavedRow>(saved, "saved", student.rows > 0);
  const py::gil_scoped_release release;
  check(cuda::token_stats_backward(in, gradients, rows, out, stream_at(stream)));
}

void update_tails(const Matrix& student, uintptr_t ids, int64_t listed, uintptr_t tokens, uintptr_t mask, int64_t vocab,
                  double temperature, int64_t first_column, const TailStateArgs& states, uintptr_t partial,
                  uintptr_t arrived, uintptr_t stream) {
  const ListedRows rows = make_listed({student, student, tokens, mask, vocab, temperature, first_column}, ids, listed);
  const TailStates tails = make_tails(states, rows);
  auto* const room = pointer<TailFields>(partial, "partial", student.rows > 0);
  auto* const counters = pointer<uint32_t>(arrived, "arrived", student.rows > 0);
  const py::gil_scoped_release release;
  check(cuda::update_tails(rows, tails, room, counters, stream_at(stream)));
}

void tail_backward(const Matrix& student, uintptr_t ids, int64_t listed, uintptr_t tokens, uintptr_t mask,
                   int64_t vocab, double temperature, int64_t first_column, const TailGradientArgs& gradient,
                   const Matrix& out, uintptr_t stream) {
  const ListedRows rows = make_listed({student, student, tokens, mask, vocab, temperature, first_column}, ids, listed);
  check_output(out, student);
  const TailGradient numbers = make_tail_gradient(gradient, rows);
  const py::gil_scoped_release release;
  check(cuda::tail_backward(rows, numbers, out, stream_at(stream)));
}

using SequenceArgs = std::tuple<uintptr_t, bool, int64_t, int64_t, int64_t>;  // as in cuda::Sequences, without the mask

cuda::Sequences make_sequences(const SequenceArgs& args, uintptr_t mask) {
  const auto [offsets, wide, count, width, tokens] = args;
  if (count < 0 || width < 0 || tokens < 0) fail("negative sizes");
  if (offsets == 0 && count * width != tokens) fail("padded sequences must fill the tokens");
  const void* start = wide ? static_cast<const void*>(pointer<const int64_t>(offsets, "offsets", false))
                           : static_cast<const void*>(pointer<const int32_t>(offsets, "offsets", false));
  return {start, wide, count, width, tokens, pointer<const uint8_t>(mask, "mask", false)};
}

cuda::Cost cost_named(const std::string& name) {
  if (name == "reverse_kl") return cuda::Cost::reverse_kl;
  if (name == "forward_kl") return cuda::Cost::forward_kl;
  if (name == "k1") return cuda::Cost::k1;
  if (name == "nll") return cuda::Cost::nll;
  fail("cost '" + name + "' is not one of reverse_kl, forward_kl, k1, nll");
}

using LimitArgs = std::tuple<uintptr_t, bool, int64_t, double, bool>;  // as in cuda::Budget

void constrained_reward(const Matrix& student, const Matrix& teacher, uintptr_t tokens, uintptr_t mask, int64_t vocab,
                        double temperature, const StatisticArgs& statistics, uintptr_t saved, uintptr_t partial,
                        uintptr_t arrived, const std::string& cost, const SequenceArgs& layout, const LimitArgs& limits,
                        const BudgetArgs& budget_rule, const RewardArgs& reward_rule, const TraceArgs& trace,
                        uintptr_t task_reward, uintptr_t reward, uintptr_t stream) {
  const Logits in = make_logits({student, teacher, tokens, mask, vocab, temperature}, true);
  if (student.rows > 0 && !wanted(statistics)) fail("the statistics are null pointers");
  const StatsOut out = make_statistics(statistics, false, saved, student.rows);
  const cuda::Scratch scratch = make_scratch(partial, arrived, student.rows);
  const cuda::Sequences sequences = make_sequences(layout, mask);
  if (sequences.tokens != student.rows) fail("there must be as many tokens as rows");
  const auto [each, wide, stride, all, per_token] = limits;
  const cuda::Budget budget{make_numbers(each, wide, "budget", false), stride, all, per_token};
  const TraceArrays lines = make_trace(trace, false, sequences.tokens, sequences.count);
  const RewardArrays rewards = make_rewards(task_reward, reward, false, sequences.tokens > 0);
  const cuda::Cost which = cost_named(cost);
  const cuda::Scan scan{make_rule(budget_rule), make_rule(reward_rule), lines, rewards};
  const py::gil_scoped_release release;
  check(cuda::constrained_reward(in, out, scratch, {sequences, budget, which, scan}, stream_at(stream)));
}

void budget_trace(uintptr_t cost, bool wide, uintptr_t mask, const SequenceArgs& layout, uintptr_t limits,
                  const BudgetArgs& budget_rule, const TraceArgs& trace, const std::optional<RewardArgs>& reward_rule,
                  uintptr_t task_reward, uintptr_t reward, uintptr_t stream) {
  const cuda::Sequences sequences = make_sequences(layout, mask);
  const Numbers costs = make_numbers(cost, wide, "cost", sequences.tokens > 0);
  const auto* limit = pointer<const double>(limits, "limits", sequences.count > 0);
  const TraceArrays lines = make_trace(trace, wide, sequences.tokens, sequences.count);
  cuda::Scan scan{make_rule(budget_rule), {}, lines, {}};
  if (reward_rule) {  // without one there is no reward
    scan.rewards = make_rewards(task_reward, reward, wide, sequences.tokens > 0);
    scan.reward = make_rule(*reward_rule);
  }
  const py::gil_scoped_release release;
  check(cuda::budget_trace(sequences, costs, limit, scan, stream_at(stream)));
}

void modified_reward(uintptr_t cost, bool wide, uintptr_t mask, const SequenceArgs& layout, const TraceArgs& trace,
                     const RewardArgs& reward_rule, uintptr_t task_reward, uintptr_t reward, uintptr_t stream) {
  const cuda::Sequences sequences = make_sequences(layout, mask);
  const Numbers costs = make_numbers(cost, wide, "cost", sequences.tokens > 0);
  const TraceArrays lines = make_trace(trace, wide, sequences.tokens, 0);
  const RewardArrays rewards = make_rewards(task_reward, reward, wide, sequences.tokens > 0);
  const cuda::Scan scan{{}, make_rule(reward_rule), lines, rewards};
  const py::gil_scoped_release release;
  check(cuda::modified_reward(sequences, costs, scan, stream_at(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of cmdp_fast: device pointers, shapes, strides and a stream in, no framework.";
  // Local to the module: cmdp_fast._C has a Matrix of its own.
  py::class_<Matrix>(module, "Matrix", py::module_local())
      .def(py::init(&make_matrix), py::arg("address"), py::arg("dtype"), py::arg("sizes"), py::arg("strides"),
           py::arg("width"));
  module.attr("PARTIAL") = cuda::kPartial;
  module.attr("SAVED") = kSaved;
#ifdef CMDP_CUDA_HOST
  module.attr("DEVICE") = "cpu";  // the kernels compiled for the host, by the tests
#else
  module.attr("DEVICE") = "cuda";
#endif
  module.def("segments", &cuda::segments, py::arg("vocab"));
  module.def("token_stats", &token_stats);
  module.def("token_stats_backward", &token_stats_backward);
  module.attr("TAIL_FIELDS") = sizeof(TailFields) / sizeof(double);
  module.def("tail_segments", &cuda::tail_segments, py::arg("vocab"));
  module.def("update_tails", &update_tails);
  module.def("tail_backward", &tail_backward);
  module.def("constrained_reward", &constrained_reward);
  module.def("budget_trace", &budget_trace);
  module.def("modified_reward", &modified_reward);
}
