// Launcher of the backward pass.
#include "backward.cuh"

#include "rows.h"

namespace cmdp::cuda {

const char* token_stats_backward(const Logits& in, const Upstream<float>& upstream, const SavedRow* saved,
                                 const Matrix& out, void* stream) {
  BackwardArguments a{};
  if (const char* problem = rows_of(in.student, a.x)) return problem;
  if (const char* problem = rows_of(in.teacher, a.y)) return problem;
  if (const char* problem = rows_of(out, a.out)) return problem;
  a.tokens = in.tokens, a.mask = in.mask, a.saved = saved, a.upstream = upstream;
  a.vocab = in.vocab, a.width = out.width, a.first_column = in.first_column;
  a.spans = static_cast<int>((out.width + kSpan - 1) / kSpan);
  a.scale = scale_of(in.temperature);
  if (out.rows * a.spans > kMaxGrid) return "there are more rows than a grid has blocks";
  if (out.rows * a.spans == 0) return nullptr;
  const int threads = out.width < 1024 ? kWarp : kThreads;
  const bool teacher = upstream.reverse_kl != nullptr || upstream.forward_kl != nullptr;
  const auto run = [&]<class X, class Y, bool kTeacher>(X, Y, std::bool_constant<kTeacher>) {
    constexpr int kVector = Shape<X, Y>::kVector;
    const bool aligned =
        lies_at<X, kVector>(a.x) && lies_at<X, kVector>(a.out) && (!kTeacher || lies_at<Y, kVector>(a.y));
    const auto kernel = aligned ? backward_kernel<X, Y, kTeacher, true> : backward_kernel<X, Y, kTeacher, false>;
    return launch(kernel, out.rows * a.spans, threads, stream, a);
  };
  if (!teacher) return with_type(in.student.dtype, [&]<class X>(X) { return run(X{}, X{}, std::false_type{}); });
  return with_types(in.student.dtype, in.teacher.dtype,
                    [&]<class X, class Y>(X, Y) { return run(X{}, Y{}, std::true_type{}); });
}

}  // namespace cmdp::cuda
