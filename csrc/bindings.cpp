// The Python module cmdp_fast._C. Pointers, shapes and strides come in; nothing here knows about torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "arguments.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/scan.h"
#include "cpu/variants.h"
#include "token_state.h"

namespace py = pybind11;
using namespace cmdp;

namespace {

const KernelTable* active = best_variant();

const KernelTable& kernels() {
  if (active == nullptr) throw std::runtime_error("no compiled kernel variant runs on this processor");
  return *active;
}

static_assert(kSegmentState == TokenState::kFields + 1);

// For whole rows. A tile may well not hold the token's column.
void check_tokens(const Logits& in) {
  if (in.tokens == nullptr) return;
  for (int64_t row = 0; row < in.student.rows; ++row) {
    if (in.mask != nullptr && in.mask[row] == 0) continue;
    if (own_column(in, row) < 0) fail("tokens: an index is outside the vocabulary");
  }
}

int checked_threads(int threads) {
  if (threads < 1) fail("the number of threads must be at least 1");
  return threads;
}

// As many threads as the work keeps busy: waking one costs as much as some ten thousand columns.
int useful_threads(int threads, int64_t rows, int64_t width) {
  const int64_t busy = 1 + rows * width / 32768;
  return static_cast<int>(std::min<int64_t>(threads, busy));
}

// Rows whose work is small are handed out many at a time.
int64_t grain_for(int64_t width) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width)); }

template <class Body>
void for_rows(const Matrix& logits, int threads, const Body& body) {
  parallel_for(logits.rows, useful_threads(threads, logits.rows, logits.width), grain_for(logits.width), body);
}

// Statistics of all rows. When there are fewer rows than threads a row is split: its segments are folded by different
// threads and merged afterwards, in the same order as always.
void run_forward(const Logits& in, const StatsOut& out, int threads) {
  const KernelTable& table = kernels();
  const int64_t rows = in.student.rows, segments = table.segments(in.vocab);
  const auto skipped = [&](int64_t row) { return in.mask != nullptr && in.mask[row] == 0; };
  const size_t row_state = static_cast<size_t>(segments) * kSegmentState;
  threads = useful_threads(threads, rows, in.vocab);
  if (rows >= threads || segments == 1) {
    parallel_for(rows, threads, grain_for(in.vocab), [&](int64_t row) {
      std::array<double, 64 * kSegmentState> stack;
      std::unique_ptr<double[]> heap;
      double* states = stack.data();
      if (row_state > stack.size()) heap.reset(new double[row_state]), states = heap.get();
      if (!skipped(row)) table.fold(in, row, 0, segments, states);
      table.finish(in, row, states, segments, out);
    });
    return;
  }
  std::vector<double> states(static_cast<size_t>(rows) * row_state);
  parallel_for(rows * segments, threads, 1, [&](int64_t item) {
    const int64_t row = item / segments, segment = item % segments;
    if (!skipped(row)) table.fold(in, row, segment, segment + 1, states.data() + row * row_state);
  });
  for (int64_t row = 0; row < rows; ++row) table.finish(in, row, states.data() + row * row_state, segments, out);
}

void token_stats(const Matrix& student, const Matrix& teacher, uintptr_t tokens, uintptr_t mask, int64_t vocab,
                 double temperature, const std::array<uintptr_t, 6>& statistics, bool wide, uintptr_t saved,
                 int threads) {
  const bool wanted = statistics[0] != 0;
  const Logits in = make_logits(student, teacher, tokens, mask, vocab, temperature, wanted);
  check_tokens(in);
  const bool any = student.rows > 0;
  StatsOut out{{}, wide, pointer<double>(saved, "saved", any)};
  for (int i = 0; i < 6; ++i) {
    out.statistics[i] = wide ? static_cast<void*>(pointer<double>(statistics[i], "a statistic", any && wanted))
                             : static_cast<void*>(pointer<float>(statistics[i], "a statistic", any && wanted));
  }
  checked_threads(threads);
  py::gil_scoped_release release;
  run_forward(in, out, threads);
}

// `first_column`: nonzero for a tile of wider rows, of which `saved` tells; a token whose column lies in another tile
// has none here.
void token_stats_backward(const Matrix& student, const Matrix& teacher, uintptr_t tokens, uintptr_t mask, int64_t vocab,
                          double temperature, const std::array<uintptr_t, 4>& upstream, uintptr_t saved,
                          const Matrix& out, int threads, int64_t first_column) {
  const Logits in = make_logits(student, teacher, tokens, mask, vocab, temperature, true, first_column);
  check_output(out, student);
  Upstream up{};
  for (int i = 0; i < 4; ++i) up.g[i] = pointer<const double>(upstream[i], "an upstream gradient", false);
  const double* scalars = pointer<const double>(saved, "saved", student.rows > 0);
  checked_threads(threads);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  for_rows(student, threads, [&](int64_t row) { table.backward(in, row, up, scalars, out); });
}

Mixture checked_mixture(double b, double c_teacher, double c_student) {
  if (!(b > 0 && b < 1)) fail("the mixture's weight must lie strictly between 0 and 1");
  return {b, c_teacher, c_student};
}

void mixture(const Matrix& student, const Matrix& teacher, uintptr_t mask, int64_t vocab, double temperature, double b,
             double c_teacher, double c_student, uintptr_t saved, uintptr_t value, uintptr_t mean, int threads) {
  const Logits in = make_logits(student, teacher, 0, mask, vocab, temperature, false);
  const Mixture mix = checked_mixture(b, c_teacher, c_student);
  const bool any = student.rows > 0;
  const double* scalars = pointer<const double>(saved, "saved", any);
  double* values = pointer<double>(value, "value", any);
  double* means = pointer<double>(mean, "mean", any);
  checked_threads(threads);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  for_rows(student, threads, [&](int64_t row) {
    if (in.mask != nullptr && in.mask[row] == 0) {
      values[row] = means[row] = 0;
    } else {
      table.mixture(in, row, mix, scalars, values + row, means + row);
    }
  });
}

void mixture_backward(const Matrix& student, const Matrix& teacher, uintptr_t mask, int64_t vocab, double temperature,
                      double b, double c_teacher, double c_student, uintptr_t saved, uintptr_t mean, uintptr_t upstream,
                      const Matrix& out, int threads) {
  const Logits in = make_logits(student, teacher, 0, mask, vocab, temperature, false);
  const Mixture mix = checked_mixture(b, c_teacher, c_student);
  check_output(out, student);
  const bool any = student.rows > 0;
  const double* scalars = pointer<const double>(saved, "saved", any);
  const double* means = pointer<const double>(mean, "mean", any);
  const double* g = pointer<const double>(upstream, "upstream", any);
  checked_threads(threads);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  for_rows(student, threads,
           [&](int64_t row) { table.mixture_backward(in, row, mix, scalars, means[row], g[row], out); });
}

// Folds a tile of columns [first_column, first_column + width) into the states of all rows that the mask keeps.
void update_states(const Matrix& student, const Matrix& teacher, uintptr_t tokens, int64_t first_column,
                   double temperature, uintptr_t states, int threads, uintptr_t mask) {
  if (student.width == 0) return;
  const Logits in = make_logits(student, teacher, tokens, mask, student.width, temperature, true, first_column);
  if (teacher.width != student.width) fail("the tiles of student and teacher have different widths");
  double* all = pointer<double>(states, "states", student.rows > 0);
  checked_threads(threads);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  for_rows(student, threads, [&](int64_t row) {
    if (in.mask == nullptr || in.mask[row] != 0) table.update(in, row, all + row * kSegmentState);
  });
}

Values make_values(uintptr_t address, bool wide, const char* name, bool needed) {
  if (wide) return {pointer<double>(address, name, needed), true};
  return {pointer<float>(address, name, needed), false};
}

// Checks that the offsets rise from 0 to total, so that no sequence reaches outside the arrays.
Sequences make_sequences(uintptr_t offsets, int64_t sequences, int64_t total, uintptr_t mask) {
  if (sequences < 0 || total < 0) fail("negative sizes");
  const auto* start = pointer<const int64_t>(offsets, "offsets", true);
  if (start[0] != 0 || start[sequences] != total) fail("offsets must begin with 0 and end with the number of tokens");
  for (int64_t i = 0; i < sequences; ++i) {
    if (start[i + 1] < start[i]) fail("offsets must not decrease");
  }
  return {start, sequences, pointer<const uint8_t>(mask, "mask", false)};
}

// cumulative, remaining, violated, first_violation, excess
TraceArrays make_trace(const std::array<uintptr_t, 5>& trace, bool wide, int64_t sequences, int64_t total) {
  const bool any = total > 0;
  return {make_values(trace[0], wide, "cumulative", any), make_values(trace[1], wide, "remaining", any),
          make_values(trace[4], wide, "excess", any), pointer<uint8_t>(trace[2], "violated", any),
          pointer<int64_t>(trace[3], "first_violation", sequences > 0)};
}

void budget_trace(uintptr_t cost, bool wide, uintptr_t mask, uintptr_t offsets, int64_t count, int64_t total,
                  uintptr_t limits, const BudgetArgs& budget, const std::array<uintptr_t, 5>& trace,
                  const std::optional<RewardArgs>& reward, uintptr_t task_reward, uintptr_t result) {
  const Sequences sequences = make_sequences(offsets, count, total, mask);
  const Values costs = make_values(cost, wide, "cost", total > 0);
  const auto* limit = pointer<const double>(limits, "limits", count > 0);
  const TraceArrays out = make_trace(trace, wide, count, total);
  const bool rewarded = reward.has_value() && total > 0;
  const Values rewards = make_values(task_reward, wide, "task_reward", rewarded);
  const Values results = make_values(result, wide, "reward", rewarded);
  const std::optional<RewardRule> rule = reward ? std::optional(make_rule(*reward)) : std::nullopt;
  const BudgetRule account = make_rule(budget);
  py::gil_scoped_release release;
  trace_budgets(sequences, costs, limit, account, out, rule ? &*rule : nullptr, rewards, results);
}

void modified_reward(uintptr_t task_reward, uintptr_t cost, bool wide, uintptr_t mask, uintptr_t offsets, int64_t count,
                     int64_t total, const std::array<uintptr_t, 4>& trace, const RewardArgs& reward, uintptr_t result) {
  const Sequences sequences = make_sequences(offsets, count, total, mask);
  const Values costs = make_values(cost, wide, "cost", total > 0);
  const Values rewards = make_values(task_reward, wide, "task_reward", total > 0);
  const Values results = make_values(result, wide, "reward", total > 0);
  const auto [cumulative, remaining, violated, excess] = trace;
  const TraceArrays lines = make_trace({cumulative, remaining, violated, 0, excess}, wide, 0, total);
  const RewardRule rule = make_rule(reward);
  py::gil_scoped_release release;
  modify_rewards(sequences, costs, lines, rule, rewards, results);
}

// What the processor offers, for `cmdp-fast info`.
std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define CMDP_FEATURE(name) \
  if (__builtin_cpu_supports(name)) found.push_back(name);
  CMDP_FEATURE("sse4.2")
  CMDP_FEATURE("avx")
  CMDP_FEATURE("avx2")
  CMDP_FEATURE("fma")
  CMDP_FEATURE("f16c")
  CMDP_FEATURE("avx512f")
  CMDP_FEATURE("avx512bw")
  CMDP_FEATURE("avx512vl")
#undef CMDP_FEATURE
#endif
  return found;
}

}  // namespace

// Asks for huge pages where fresh memory will be written from end to end: page by page, the faults cost more than the
// writing. Advice only, about whole pages within the range; what the system makes of it changes no result.
static bool advise_huge_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  if (address == 0 || bytes > UINTPTR_MAX - address - page) return false;
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  return end > begin && madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0;
#else
  (void)address, (void)bytes;
  return false;
#endif
}

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of cmdp_fast: pointers, shapes and strides in, no framework.";

  py::class_<Matrix>(module, "Matrix", "Rows of logits at an address: leading sizes and strides in elements.")
      .def(py::init(&make_matrix), py::arg("address"), py::arg("dtype"), py::arg("sizes"), py::arg("strides"),
           py::arg("width"))
      .def_readonly("rows", &Matrix::rows)
      .def_readonly("width", &Matrix::width);

  // The state's algebra itself, for tests and for those who read.
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
      .def("finish",
           [](const TokenState& state) {
             const TokenStats s = state.finish();
             return std::array<double, 6>{s.logprob,         s.teacher_logprob, s.entropy,
                                          s.teacher_entropy, s.reverse_kl,      s.forward_kl};
           })
      .def("fields", [](const TokenState& s) {
        return std::array<double, TokenState::kFields>{s.m, s.n, s.z,  s.u,  s.a,     s.b,
                                                       s.h, s.k, s.xa, s.ya, s.r_inf, s.f_inf};
      });

  module.attr("SAVED") = kSaved;
  module.attr("STATE") = kSegmentState;
  module.def("token_stats", &token_stats);
  module.def("token_stats_backward", &token_stats_backward, py::arg("student"), py::arg("teacher"), py::arg("tokens"),
             py::arg("mask"), py::arg("vocab"), py::arg("temperature"), py::arg("upstream"), py::arg("saved"),
             py::arg("out"), py::arg("threads"), py::arg("first_column") = 0);
  module.def("mixture", &mixture);
  module.def("mixture_backward", &mixture_backward);
  module.def("update_states", &update_states, py::arg("student"), py::arg("teacher"), py::arg("tokens"),
             py::arg("first_column"), py::arg("temperature"), py::arg("states"), py::arg("threads"),
             py::arg("mask") = 0);
  module.def("budget_trace", &budget_trace);
  module.def("modified_reward", &modified_reward);

  module.def("advise_huge_pages", &advise_huge_pages, py::arg("address"), py::arg("bytes"));
  module.def("variants", [] {
    std::vector<std::pair<std::string, bool>> all;
    for (const Variant& variant : variants()) all.emplace_back(variant.table->name, variant.supported);
    return all;
  });
  module.def("variant", [] { return std::string(kernels().name); });
  module.def("set_variant", [](const std::string& name) { active = variant_named(name); });
  module.def("cpu_features", &cpu_features);
  module.attr("SOURCES") = CMDP_SOURCES;      // a hash of the files that it was built from
  module.attr("CUDA_NOTE") = CMDP_CUDA_NOTE;  // why cmdp_fast._cuda was not built with it; empty if it was
#ifdef _OPENMP
  module.attr("OPENMP") = true;
#else
  module.attr("OPENMP") = false;
#endif
}
