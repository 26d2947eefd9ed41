// Launchers of the forward pass, of everything that begins with it, and of the scans.
#include "token_stats.cuh"

#include "rows.h"

namespace cmdp::cuda {
namespace {

template <class X, class Y>
bool aligned(const FoldArguments& a) {
  return lies_at<X, Shape<X, Y>::kVector>(a.x) && lies_at<Y, Shape<X, Y>::kVector>(a.y);
}

// The arguments, and why they cannot be served.
const char* prepare(const Logits& in, const StatsOut& out, const Scratch& scratch, FoldArguments& a) {
  if (out.wide) return "the CUDA kernels write float32 statistics";
  if (const char* problem = rows_of(in.student, a.x)) return problem;
  if (const char* problem = rows_of(in.teacher, a.y)) return problem;
  a.tokens = out.statistics[kLogprob] == nullptr ? nullptr : in.tokens;
  a.mask = in.mask;
  a.vocab = in.vocab;
  a.segment = settings_of(in.vocab).segment;
  a.segments = static_cast<int>(segments(in.vocab));
  a.scale = scale_of(in.temperature);
  for (int i = 0; i < kStatistics; ++i) a.statistics[i] = static_cast<float*>(out.statistics[i]);
  a.saved = out.saved;
  a.scratch = scratch;
  a.rows = in.student.rows;
  if (a.rows * a.segments >= kMaxGrid) return "there are more rows than a grid has blocks";
  return nullptr;
}

}  // namespace

int64_t segments(int64_t vocab) {
  const int64_t segment = settings_of(vocab).segment;
  return (vocab + segment - 1) / segment;
}

const char* token_stats(const Logits& in, const StatsOut& out, const Scratch& scratch, void* stream) {
  FoldArguments a;
  if (const char* problem = prepare(in, out, scratch, a)) return problem;
  if (a.rows == 0) return nullptr;
  return with_types(in.student.dtype, in.teacher.dtype, [&]<class X, class Y>(X, Y) {
    const auto kernel = aligned<X, Y>(a) ? token_stats_kernel<X, Y, true> : token_stats_kernel<X, Y, false>;
    return launch(kernel, a.rows * a.segments, settings_of(a.vocab).threads, stream, a);
  });
}

const char* constrained_reward(const Logits& in, const StatsOut& out, const Scratch& scratch, const Method& method,
                               void* stream) {
  ConstrainedArguments a{{}, method};
  if (const char* problem = prepare(in, out, scratch, a.fold)) return problem;
  if (method.sequences.count == 0) return nullptr;
  return with_types(in.student.dtype, in.teacher.dtype, [&]<class X, class Y>(X, Y) {
    const auto kernel = aligned<X, Y>(a.fold) ? constrained_kernel<X, Y, true> : constrained_kernel<X, Y, false>;
    return launch(kernel, a.fold.rows * a.fold.segments + 1, settings_of(a.fold.vocab).threads, stream, a);
  });
}

const char* budget_trace(const Sequences& sequences, const Numbers& cost, const double* limits, const Scan& scan,
                         void* stream) {
  if (sequences.count == 0) return nullptr;
  if (sequences.count > kMaxGrid) return "there are more sequences than a grid has blocks";
  return launch(trace_kernel, sequences.count, kThreads, stream, sequences, cost, limits, scan);
}

const char* modified_reward(const Sequences& sequences, const Numbers& cost, const Scan& scan, void* stream) {
  if (sequences.count == 0) return nullptr;
  if (sequences.count > kMaxGrid) return "there are more sequences than a grid has blocks";
  return launch(reward_kernel, sequences.count, kThreads, stream, sequences, cost, scan);
}

}  // namespace cmdp::cuda
