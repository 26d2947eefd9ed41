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

// A launcher's message is an error.
void check(const char* problem) {
  if (problem != nullptr) throw std::runtime_error(problem);
}

void* stream_at(uintptr_t stream) { return reinterpret_cast<void*>(stream); }

StatsOut make_statistics(const std::array<uintptr_t, 6>& statistics, uintptr_t saved, bool any) {
  const bool wanted = statistics[0] != 0;
  StatsOut out{{}, false, pointer<double>(saved, "saved", any)};
  for (int i = 0; i < 6; ++i) out.statistics[i] = pointer<float>(statistics[i], "a statistic", any && wanted);
  return out;
}

cuda::Scratch make_scratch(uintptr_t partial, uintptr_t arrived, bool any) {
  return {pointer<double>(partial, "partial", any), pointer<uint32_t>(arrived, "arrived", any)};
}

void token_stats(const Matrix& student, const Matrix& teacher, uintptr_t tokens, uintptr_t mask, int64_t vocab,
                 double temperature, const std::array<uintptr_t, 6>& statistics, uintptr_t saved, uintptr_t partial,
                 uintptr_t arrived, uintptr_t stream) {
  const bool any = student.rows > 0;
  const Logits in = make_logits(student, teacher, tokens, mask, vocab, temperature, statistics[0] != 0);
  const StatsOut out = make_statistics(statistics, saved, any);
  const cuda::Scratch scratch = make_scratch(partial, arrived, any);
  const py::gil_scoped_release release;
  check(cuda::token_stats(in, out, scratch, stream_at(stream)));
}

void token_stats_backward(const Matrix& student, const Matrix& teacher, uintptr_t tokens, uintptr_t mask, int64_t vocab,
                          double temperature, const std::array<uintptr_t, 4>& upstream, uintptr_t saved,
                          const Matrix& out, int64_t first_column, uintptr_t stream) {
  const Logits in = make_logits(student, teacher, tokens, mask, vocab, temperature, upstream[0] != 0, first_column);
  check_output(out, student);
  cuda::Upstream flowing{};
  for (int i = 0; i < 4; ++i) flowing.g[i] = pointer<const float>(upstream[i], "an upstream gradient", false);
  const auto* scalars = pointer<const double>(saved, "saved", student.rows > 0);
  const py::gil_scoped_release release;
  check(cuda::token_stats_backward(in, flowing, scalars, out, stream_at(stream)));
}

cuda::Numbers make_numbers(uintptr_t address, bool wide, const char* name, bool needed) {
  if (wide) return {pointer<double>(address, name, needed), true};
  return {pointer<float>(address, name, needed), false};
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

// cumulative, remaining, violated, first_violation, excess
using TraceArgs = std::array<uintptr_t, 5>;

// Without a reward rule there is no reward.
cuda::Outcome make_outcome(const TraceArgs& trace, uintptr_t task_reward, uintptr_t reward, bool rewarded, bool wide,
                           const cuda::Sequences& sequences, bool needs_first) {
  const bool any = sequences.tokens > 0, paid = any && rewarded;
  return {make_numbers(trace[0], wide, "cumulative", any),
          make_numbers(trace[1], wide, "remaining", any),
          make_numbers(trace[4], wide, "excess", any),
          pointer<uint8_t>(trace[2], "violated", any),
          pointer<int64_t>(trace[3], "first_violation", needs_first && sequences.count > 0),
          make_numbers(rewarded ? task_reward : 0, wide, "task_reward", paid),
          make_numbers(rewarded ? reward : 0, wide, "reward", paid)};
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
                        double temperature, const std::array<uintptr_t, 6>& statistics, uintptr_t saved,
                        uintptr_t partial, uintptr_t arrived, const std::string& cost, const SequenceArgs& layout,
                        const LimitArgs& limits, const BudgetArgs& budget_rule, const RewardArgs& reward_rule,
                        const TraceArgs& trace, uintptr_t task_reward, uintptr_t reward, uintptr_t stream) {
  const bool any = student.rows > 0;
  const Logits in = make_logits(student, teacher, tokens, mask, vocab, temperature, true);
  if (any && statistics[0] == 0) fail("the statistics are null pointers");
  const StatsOut out = make_statistics(statistics, saved, any);
  const cuda::Scratch scratch = make_scratch(partial, arrived, any);
  const cuda::Sequences sequences = make_sequences(layout, mask);
  if (sequences.tokens != student.rows) fail("there must be as many tokens as rows");
  const auto [each, wide, stride, all, per_token] = limits;
  const cuda::Budget budget{make_numbers(each, wide, "budget", false), stride, all, per_token};
  const cuda::Outcome outcome = make_outcome(trace, task_reward, reward, true, false, sequences, true);
  const cuda::Cost which = cost_named(cost);
  const BudgetRule account = make_rule(budget_rule);
  const RewardRule rule = make_rule(reward_rule);
  const py::gil_scoped_release release;
  check(
      cuda::constrained_reward(in, out, which, sequences, budget, account, rule, outcome, scratch, stream_at(stream)));
}

void budget_trace(uintptr_t cost, bool wide, uintptr_t mask, const SequenceArgs& layout, uintptr_t limits,
                  const BudgetArgs& budget_rule, const TraceArgs& trace, const std::optional<RewardArgs>& reward_rule,
                  uintptr_t task_reward, uintptr_t reward, uintptr_t stream) {
  const cuda::Sequences sequences = make_sequences(layout, mask);
  const cuda::Numbers costs = make_numbers(cost, wide, "cost", sequences.tokens > 0);
  const auto* limit = pointer<const double>(limits, "limits", sequences.count > 0);
  const cuda::Outcome outcome =
      make_outcome(trace, task_reward, reward, reward_rule.has_value(), wide, sequences, true);
  const BudgetRule account = make_rule(budget_rule);
  const RewardRule rule = reward_rule ? make_rule(*reward_rule) : RewardRule{};
  const py::gil_scoped_release release;
  check(cuda::budget_trace(sequences, costs, limit, account, rule, outcome, stream_at(stream)));
}

void modified_reward(uintptr_t cost, bool wide, uintptr_t mask, const SequenceArgs& layout, const TraceArgs& trace,
                     const RewardArgs& reward_rule, uintptr_t task_reward, uintptr_t reward, uintptr_t stream) {
  const cuda::Sequences sequences = make_sequences(layout, mask);
  const cuda::Numbers costs = make_numbers(cost, wide, "cost", sequences.tokens > 0);
  const cuda::Outcome outcome = make_outcome(trace, task_reward, reward, true, wide, sequences, false);
  const RewardRule rule = make_rule(reward_rule);
  const py::gil_scoped_release release;
  check(cuda::modified_reward(sequences, costs, rule, outcome, stream_at(stream)));
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
  module.def("constrained_reward", &constrained_reward);
  module.def("budget_trace", &budget_trace);
  module.def("modified_reward", &modified_reward);
}
