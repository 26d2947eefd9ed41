// The budget's account of a sequence and the reward it modifies, by the threads of one block.
//
// Only the sum of the costs has to be made token after token, if it is to be the same as on the CPU: one thread makes
// it, from shared memory, and notes the account as it stands before each token. From there each thread pushes a token
// of its own through budget.h. A violation is absorbing, so that `violated` needs no scan: it holds from the first
// token on that is over budget. A sequence is read in chunks of the block's size, which does not change the order.
#pragma once

#include "../arrays.h"
#include "../budget.h"
#include "device.cuh"
#include "launch.h"

namespace cmdp::cuda {

struct Span {
  int64_t begin, stop;
};

__device__ __forceinline__ int64_t offset_of(const Sequences& s, int64_t i) {
  return s.wide_offsets ? static_cast<const int64_t*>(s.offsets)[i] : static_cast<const int32_t*>(s.offsets)[i];
}

// Where a sequence lies. Unchecked offsets must not lead outside of the arrays.
__device__ __forceinline__ Span span_of(const Sequences& s, int64_t i) {
  if (s.offsets == nullptr) return {i * s.width, (i + 1) * s.width};
  const int64_t begin = offset_of(s, i), stop = offset_of(s, i + 1);
  return {begin > 0 ? begin : 0, stop < s.tokens ? stop : s.tokens};
}

// The sequence that a token belongs to; -1 if there is none.
__device__ __forceinline__ int64_t sequence_of(const Sequences& s, int64_t token) {
  // There are fewer than 2^31 tokens, and a division in 64 bits takes long.
  if (s.offsets == nullptr) return static_cast<uint32_t>(token) / static_cast<uint32_t>(s.width);
  int64_t low = 0, high = s.count + 1;  // the first offset beyond the token lies in (low, high]
  if (token < offset_of(s, 0)) return -1;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (offset_of(s, middle) <= token ? low : high) = middle;
  }
  return low < s.count ? low : -1;
}

// How many tokens of a sequence count. All threads of the block.
__device__ __forceinline__ int64_t count_unmasked(const uint8_t* mask, const Span& span) {
  if (mask == nullptr) return span.stop - span.begin;
  __shared__ int total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  int mine = 0;
#pragma unroll 1
  for (int64_t i = span.begin + threadIdx.x; i < span.stop; i += blockDim.x) mine += mask[i] != 0;
  atomicAdd(&total, mine);
  __syncthreads();
  return total;
}

// The trace of a sequence, and the reward if it is wanted, computed from the trace as it was rounded. All threads of
// the block.
template <class CostOf>
__device__ __forceinline__ void scan_sequence(const Scan& scan, const CostOf& cost, const uint8_t* mask,
                                              int64_t sequence, const Span& span, double limit) {
  // The account before each token, and at the end the one before the next chunk.
  __shared__ double costs[kThreads], sums[kThreads + 1], discounts[kThreads + 1];
  __shared__ int64_t counts[kThreads + 1];
  __shared__ bool counted[kThreads];
  __shared__ int first, outside;  // of the chunk: the token that crosses the budget, one that leaves the barrier
  const TraceArrays& to = scan.trace;
  const int i = threadIdx.x;
  const auto account_before = [limit](int j) {
    BudgetState account;
    account.limit = limit, account.sum = sums[j], account.discount = discounts[j], account.count = counts[j];
    return account;
  };
  const auto note = [](int j, const BudgetState& account) {
    sums[j] = account.sum, discounts[j] = account.discount, counts[j] = account.count;
  };
  bool violated = false, inside = true;
  if (i == 0) {
    to.first_violation[sequence] = span.stop - span.begin;
    note(kThreads, BudgetState{});
  }
#pragma unroll 1
  for (int64_t start = span.begin; start < span.stop; start += blockDim.x) {
    const int count = static_cast<int>(span.stop - start < blockDim.x ? span.stop - start : blockDim.x);
    const int64_t at = start + i;
    const bool real = i < count, counts_here = real && unmasked(mask, at);
    const double paid = counts_here ? cost[at] : 0;
    costs[i] = paid;
    counted[i] = counts_here;
    if (i == 0) first = outside = count;
    __syncthreads();
    if (i == 0) {
      BudgetState account = account_before(kThreads);
#pragma unroll 4
      for (int j = 0; j < count; ++j) {
        note(j, account);
        if (counted[j]) account.pay(costs[j], scan.budget);
      }
      note(kThreads, account);
    }
    __syncthreads();
    BudgetStep step{};
    double remaining_before = 0;
    bool started = false;
    if (real) {
      BudgetState account = account_before(i);
      account.violated = violated;
      started = account.count > 0;
      const BudgetStep before = account.carry(scan.budget);
      step = counts_here ? account.push(paid, scan.budget) : before;
      remaining_before = to.remaining.rounded(before.remaining);
      if (step.crossing) atomicMin(&first, i);
      if (counts_here && !(to.remaining.rounded(step.remaining) > 0)) atomicMin(&outside, i);
    }
    __syncthreads();
    const int crossing = first, leaving = outside;  // `count` where there is none
    if (real) {
      const bool over = violated || i >= crossing;
      const RewardInput line{paid,
                             to.cumulative.set(at, step.cumulative),
                             to.remaining.set(at, step.remaining),
                             to.excess.set(at, step.excess),
                             over,
                             i == crossing};
      to.violated[at] = over;
      if (scan.rewards.wanted()) {
        RewardState rewards;
        rewards.remaining_before = remaining_before, rewards.started = started;
        rewards.inside = inside && leaving >= i;
        scan.rewards.reward.set(at, counts_here ? rewards.push(scan.rewards.task_reward[at], line, scan.reward) : 0);
      }
    }
    if (real && i == crossing) to.first_violation[sequence] = at - span.begin;
    violated = violated || crossing < count;
    inside = inside && leaving == count;
    __syncthreads();
  }
}

// One block per sequence.
__global__ void __launch_bounds__(kThreads)
    trace_kernel(const __grid_constant__ Sequences sequences, const __grid_constant__ Numbers cost,
                 const double* limits, const __grid_constant__ Scan scan) {
  const int64_t sequence = blockIdx.x;
  scan_sequence(scan, cost, sequences.mask, sequence, span_of(sequences, sequence), limits[sequence]);
}

// The modified reward of a sequence from a trace that exists already. One block per sequence.
__global__ void __launch_bounds__(kThreads)
    reward_kernel(const __grid_constant__ Sequences sequences, const __grid_constant__ Numbers cost,
                  const __grid_constant__ Scan scan) {
  __shared__ int first_unmasked, outside;
  const TraceArrays& trace = scan.trace;
  const Span span = span_of(sequences, blockIdx.x);
  const int i = threadIdx.x;
  bool started = false, inside = true;
#pragma unroll 1
  for (int64_t start = span.begin; start < span.stop; start += blockDim.x) {
    const int64_t at = start + i;
    const bool real = at < span.stop, counts = real && unmasked(sequences.mask, at);
    if (i == 0) first_unmasked = outside = kThreads;
    __syncthreads();
    const double remaining = real ? trace.remaining[at] : 0;
    if (counts) atomicMin(&first_unmasked, i);
    if (counts && !(remaining > 0)) atomicMin(&outside, i);
    __syncthreads();
    if (real) {
      const bool earlier = started || first_unmasked < i, violated = trace.violated[at] != 0;
      int64_t before = at - 1;  // the last unmasked token: a masked one's entries may be any
      while (counts && earlier && !unmasked(sequences.mask, before)) --before;
      RewardState rewards;
      rewards.started = earlier;
      rewards.inside = inside && outside >= i;
      rewards.remaining_before = earlier ? trace.remaining[before] : 0;
      const RewardInput line{cost[at],  trace.cumulative[at],
                             remaining, trace.excess[at],
                             violated,  violated && !(earlier && trace.violated[before] != 0)};
      scan.rewards.reward.set(at, counts ? rewards.push(scan.rewards.task_reward[at], line, scan.reward) : 0);
    }
    started = started || first_unmasked < kThreads;
    inside = inside && outside == kThreads;
    __syncthreads();
  }
}

}  // namespace cmdp::cuda
