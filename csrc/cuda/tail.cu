// Launchers of the tail of a row.
#include "tail.cuh"

#include "rows.h"

namespace cmdp::cuda {
namespace {

// The arguments, and why they cannot be served.
const char* prepare(const ListedRows& rows, ListedArguments& a) {
  if (const char* problem = rows_of(rows.in.student, a.x)) return problem;
  a.ids = rows.ids, a.listed = rows.listed, a.tokens = rows.in.tokens, a.mask = rows.in.mask;
  a.vocab = rows.in.vocab, a.first_column = rows.in.first_column, a.scale = scale_of(rows.in.temperature);
  return nullptr;
}

int64_t tail_segment(int64_t vocab) {
  const int64_t segment = settings_of(vocab).segment;
  return segment < kTailSegment ? segment : kTailSegment;
}

}  // namespace

int64_t tail_segments(int64_t vocab) { return (vocab + tail_segment(vocab) - 1) / tail_segment(vocab); }

const char* update_tails(const ListedRows& rows, const TailStates& states, TailFields* partial, uint32_t* arrived,
                         void* stream) {
  TailArguments a{};
  if (const char* problem = prepare(rows, a.rows)) return problem;
  a.segment = tail_segment(a.rows.vocab);
  a.segments = static_cast<int>(tail_segments(a.rows.vocab));
  a.states = states, a.partial = partial, a.arrived = arrived;
  const int64_t count = rows.in.student.rows * a.segments;
  if (count > kMaxGrid) return "there are more rows than a grid has blocks";
  if (count == 0) return nullptr;
  return with_type(rows.in.student.dtype, [&]<class X>(X) {
    const auto kernel = lies_at<X, Shape<X, X>::kVector>(a.rows.x) ? tail_kernel<X, true> : tail_kernel<X, false>;
    return launch(kernel, count, settings_of(a.rows.vocab).threads, stream, a);
  });
}

const char* tail_backward(const ListedRows& rows, const TailGradient& gradient, const Matrix& out, void* stream) {
  TailBackwardArguments a{};
  if (const char* problem = prepare(rows, a.rows)) return problem;
  if (const char* problem = rows_of(out, a.out)) return problem;
  a.gradient = gradient, a.width = out.width;
  a.spans = static_cast<int>((out.width + kSpan - 1) / kSpan);
  const int64_t count = out.rows * a.spans;
  if (count > kMaxGrid) return "there are more rows than a grid has blocks";
  if (count == 0) return nullptr;
  return with_type(out.dtype, [&]<class X>(X) {
    constexpr int kVector = Shape<X, X>::kVector;
    const bool aligned = lies_at<X, kVector>(a.rows.x) && lies_at<X, kVector>(a.out);
    const auto kernel = aligned ? tail_backward_kernel<X, true> : tail_backward_kernel<X, false>;
    return launch(kernel, count, out.width < 1024 ? kWarp : kThreads, stream, a);
  });
}

}  // namespace cmdp::cuda
