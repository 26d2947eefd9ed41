// Host launchers of the CUDA kernels: raw addresses of device memory, sizes and strides in elements, the caller's
// stream.
//
// Every launcher starts one kernel (none if there is nothing to do) on `stream` (a cudaStream_t) of the current device
// and returns at once: nullptr, or a message that says what was wrong. Nothing is allocated, nothing is synchronised,
// so that launches can be captured in a CUDA graph. Structures and dtypes are those of the CPU kernels; float64 logits
// are refused, and rows of more than two strides once neighbouring axes are merged (copy them first).
#pragma once

#include <cstdint>

#include "../arrays.h"
#include "../budget.h"
#include "../logits.h"
#include "../tail.h"

namespace cmdp::cuda {

// A folded segment of a row: its TokenState but for the token's logits, and 1 if it was folded exactly,
// else 0. As Python allots it: kPartial doubles.
struct PartialState {
  double m, n, z, u, a, b, h, k, r_inf, f_inf;
  double exact;
};
constexpr int kPartial = sizeof(PartialState) / sizeof(double);
static_assert(kPartial == 11);

// Into how many segments a row is cut. Depends on the width alone, so that a row's result does not depend on the batch.
int64_t segments(int64_t vocab);

// Scratch memory of the forward pass. `partial` [rows, segments(vocab)] may hold anything. `arrived` [rows, and for
// constrained_reward sequences + 1 more] must hold zeros and holds zeros again when the kernel is done, so that it can
// serve launch after launch and replay after replay; launches that may overlap must not share it.
struct Scratch {
  PartialState* partial;
  uint32_t* arrived;
};

// Statistics [rows] float32 (all null if only `saved` is wanted; `out.wide` must be false) and `saved` [rows]. A token
// outside the vocabulary makes its two log-probabilities NaN.
const char* token_stats(const Logits& in, const StatsOut& out, const Scratch& scratch, void* stream);

// Gradient of the student's logits, written to `out` (of their dtype and width), which may be the logits themselves.
// The teacher is read only if reverse_kl or forward_kl has an upstream gradient, tokens only if logprob has.
// `in.first_column`: nonzero for a tile of wider rows, which `saved` describes.
const char* token_stats_backward(const Logits& in, const Upstream<float>& upstream, const SavedRow* saved,
                                 const Matrix& out, void* stream);

// Columns that a block of `update_tails` folds at most: it keeps a bit of shared memory for each.
constexpr int kTailSegment = 32768;

// Into how many segments a row is cut.
int64_t tail_segments(int64_t vocab);

// Folds a tile of columns into the tails of the rows. `partial` [rows, tail_segments(vocab)] may hold anything, and
// `arrived` [rows] is as in Scratch.
const char* update_tails(const ListedRows& rows, const TailStates& states, TailFields* partial, uint32_t* arrived,
                         void* stream);

// The gradient of the student's logits, written to `out` (of their dtype and width), which may be the logits.
const char* tail_backward(const ListedRows& rows, const TailGradient& gradient, const Matrix& out, void* stream);

// Sequences of tokens, one after another: padded ([count, width], offsets null) or packed. Offsets that nobody has
// checked lead nowhere outside of `tokens`.
struct Sequences {
  const void* offsets;  // [count + 1] int64, or int32; or null
  bool wide_offsets;    // int64
  int64_t count, width, tokens;
  const uint8_t* mask;  // [tokens], 0 = does not count; or null
};

// How a scan treats the costs of a sequence, and where the trace and the modified reward of each token go.
struct Scan {
  BudgetRule budget;
  RewardRule reward;
  TraceArrays trace;
  RewardArrays rewards;
};

enum class Cost : int { reverse_kl, forward_kl, k1, nll };

// The budget of a sequence: `each[i * stride]` if given, else `all`; times the number of unmasked tokens if
// `per_token`.
struct Budget {
  Numbers each;
  int64_t stride;
  double all;
  bool per_token;
};

// The whole method but for its statistics: whose budget, of which cost, and the scan.
struct Method {
  Sequences sequences;
  Budget budget;
  Cost cost;
  Scan scan;
};

// Statistics, budget and modified reward in one launch. The scan's arrays are float32; sequences.tokens = rows,
// sequences.mask = in.mask.
const char* constrained_reward(const Logits& in, const StatsOut& out, const Scratch& scratch, const Method& method,
                               void* stream);

// The trace of costs [tokens], and the reward if it is wanted. All Numbers are alike wide; limits [count].
const char* budget_trace(const Sequences& sequences, const Numbers& cost, const double* limits, const Scan& scan,
                         void* stream);

// The modified reward from a trace that exists already (scan.budget and trace.first_violation are not used).
const char* modified_reward(const Sequences& sequences, const Numbers& cost, const Scan& scan, void* stream);

}  // namespace cmdp::cuda

// To compile csrc/cuda/*.cu and *.cuh with a host compiler, as tests do: where __CUDACC__ is not defined, the header
// that stands in for CUDA must come first (-include) and give
//   __global__ __device__ __host__ __forceinline__ __launch_bounds__(...) __grid_constant__ __shared__ (static only)
//   threadIdx.x blockIdx.x blockDim.x gridDim.x, uint4 {x, y, z, w}, make_uint4, uint2 {x, y}, make_uint2
//   __syncthreads __syncwarp __shfl_xor_sync (float, double, int) __shfl_sync __any_sync atomicInc(unsigned*, unsigned)
//   atomicMin(int*, int) and atomicAdd(int*, int) on shared memory, __threadfence
//   fmaf exp log exp2 exp2f log2f fmaxf fminf isfinite of <cmath>, at global scope
// and  template <class... P> const char* cmdp::cuda::launch(void (*kernel)(P...), int64_t grid, int block, void*
// stream, std::type_identity_t<P>... arguments), which runs all blocks and returns nullptr. Inline PTX (ex2.approx,
// max.bf16x2, conversions of 16-bit floats) stands behind functions in device.cuh that have a host alternative of their
// own; 128-bit loads are reads through a uint4*. Threads of a block that have returned no longer take part in its
// barriers.
