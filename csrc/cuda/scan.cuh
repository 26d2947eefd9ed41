// The budget's account of a sequence and the reward it modifies, by the threads of one block.
//
// Only the sum of the costs has to be made token after token, if it is to be the same as on the CPU: one thread makes
// it, from shared memory, and notes the account as every token finds it. From there each thread pushes a token of its
// own through budget.h. A violation is absorbing, so that `violated` needs no scan: it holds from the first token on
// that is over budget. A sequence is read in chunks of the block's size, which changes nothing about the order.
#pragma once

#include "../budget.h"
#include "device.cuh"
#include "launch.h"

namespace cmdp::cuda {

struct ScanArguments {
  BudgetRule budget;
  RewardRule reward;
  Outcome outcome;
};

__device__ __forceinline__ double number(const Numbers& numbers, int64_t i) {
  return numbers.wide ? static_cast<const double*>(numbers.data)[i] : static_cast<const float*>(numbers.data)[i];
}

// Returns what was written, so that whoever continues from it sees the rounded value.
__device__ __forceinline__ double set(const Numbers& numbers, int64_t i, double value) {
  if (!numbers.wide) return static_cast<float*>(numbers.data)[i] = static_cast<float>(value);
  return static_cast<double*>(numbers.data)[i] = value;
}

__device__ __forceinline__ double rounded(const Numbers& like, double value) {
  return like.wide ? value : static_cast<float>(value);
}

struct NumberCost {
  Numbers numbers;
  __device__ __forceinline__ double operator[](int64_t i) const { return number(numbers, i); }
};

struct Span {
  int64_t begin, stop;
};

__device__ __forceinline__ int64_t offset_of(const Sequences& s, int64_t i) {
  return s.wide_offsets ? static_cast<const int64_t*>(s.offsets)[i] : static_cast<const int32_t*>(s.offsets)[i];
}

// Where a sequence lies. Offsets that nobody has checked must not lead outside of the arrays.
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

__device__ __forceinline__ bool keeps(const uint8_t* mask, int64_t i) { return mask == nullptr || mask[i] != 0; }

// How many tokens of a sequence count. All threads of the block.
__device__ __forceinline__ int64_t count_kept(const uint8_t* mask, int64_t begin, int64_t stop) {
  if (mask == nullptr) return stop - begin;
  __shared__ int kept;
  if (threadIdx.x == 0) kept = 0;
  __syncthreads();
  int mine = 0;
#pragma unroll 1
  for (int64_t i = begin + threadIdx.x; i < stop; i += blockDim.x) mine += mask[i] != 0;
  atomicAdd(&kept, mine);
  __syncthreads();
  return kept;
}

// The trace of a sequence, and the reward if it is wanted, computed from the trace as it was rounded. All threads of
// the block.
template <class CostOf>
__device__ __forceinline__ void scan_sequence(const ScanArguments& a, const CostOf& cost, const uint8_t* mask,
                                              int64_t sequence, const Span& span, double limit) {
  // The account as every token finds it, and at the end as the next chunk does.
  __shared__ double costs[kThreads], sums[kThreads + 1], discounts[kThreads + 1];
  __shared__ int64_t counts[kThreads + 1];
  __shared__ bool kept[kThreads];
  __shared__ int first, outside;  // of the chunk: the token that crosses the budget, one that leaves the barrier
  const Outcome& to = a.outcome;
  const int i = threadIdx.x;
  const auto found_by = [limit](int j) {
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
    const bool real = i < count, keep = real && keeps(mask, at);
    const double paid = keep ? cost[at] : 0;
    costs[i] = paid;
    kept[i] = keep;
    if (i == 0) first = outside = count;
    __syncthreads();
    if (i == 0) {
      BudgetState account = found_by(kThreads);
#pragma unroll 4
      for (int j = 0; j < count; ++j) {
        note(j, account);
        if (kept[j]) account.pay(costs[j], a.budget);
      }
      note(kThreads, account);
    }
    __syncthreads();
    BudgetStep step{};
    double remaining_before = 0;
    bool started = false;
    if (real) {
      BudgetState found = found_by(i);
      found.violated = violated;
      started = found.count > 0;
      const BudgetStep before = found.carry(a.budget);
      step = keep ? found.push(paid, a.budget) : before;
      remaining_before = rounded(to.remaining, before.remaining);
      if (step.crossing) atomicMin(&first, i);
      if (keep && !(rounded(to.remaining, step.remaining) > 0)) atomicMin(&outside, i);
    }
    __syncthreads();
    const int crossing = first, leaving = outside;  // `count` where there is none
    if (real) {
      const bool over = violated || i >= crossing;
      const RewardInput line{paid,
                             set(to.cumulative, at, step.cumulative),
                             set(to.remaining, at, step.remaining),
                             set(to.excess, at, step.excess),
                             over,
                             i == crossing};
      to.violated[at] = over;
      if (to.reward.data != nullptr) {
        RewardState rewards;
        rewards.remaining_before = remaining_before, rewards.started = started;
        rewards.inside = inside && leaving >= i;
        set(to.reward, at, keep ? rewards.push(number(to.task_reward, at), line, a.reward) : 0);
      }
    }
    if (real && i == crossing) to.first_violation[sequence] = at - span.begin;
    violated = violated || crossing < count;
    inside = inside && leaving == count;
    __syncthreads();
  }
}

// One block a sequence.
__global__ void __launch_bounds__(kThreads)
    trace_kernel(const __grid_constant__ Sequences sequences, const __grid_constant__ NumberCost cost,
                 const double* limits, const __grid_constant__ ScanArguments a) {
  const int64_t sequence = blockIdx.x;
  scan_sequence(a, cost, sequences.mask, sequence, span_of(sequences, sequence), limits[sequence]);
}

// The modified reward of a sequence from a trace that exists already. One block a sequence.
__global__ void __launch_bounds__(kThreads)
    reward_kernel(const __grid_constant__ Sequences sequences, const __grid_constant__ NumberCost cost,
                  const __grid_constant__ ScanArguments a) {
  __shared__ int first_kept, outside;
  const Outcome& to = a.outcome;
  const Span span = span_of(sequences, blockIdx.x);
  const int i = threadIdx.x;
  bool started = false, inside = true;
#pragma unroll 1
  for (int64_t start = span.begin; start < span.stop; start += blockDim.x) {
    const int64_t at = start + i;
    const bool real = at < span.stop, keep = real && keeps(sequences.mask, at);
    if (i == 0) first_kept = outside = kThreads;
    __syncthreads();
    const double remaining = real ? number(to.remaining, at) : 0;
    if (keep) atomicMin(&first_kept, i);
    if (keep && !(remaining > 0)) atomicMin(&outside, i);
    __syncthreads();
    if (real) {
      const bool earlier = at > span.begin, violated = to.violated[at] != 0;
      RewardState rewards;
      rewards.started = started || first_kept < i;
      rewards.inside = inside && outside >= i;
      rewards.remaining_before = earlier ? number(to.remaining, at - 1) : 0;
      const RewardInput line{cost[at],  number(to.cumulative, at),
                             remaining, number(to.excess, at),
                             violated,  violated && !(earlier && to.violated[at - 1] != 0)};
      set(to.reward, at, keep ? rewards.push(number(to.task_reward, at), line, a.reward) : 0);
    }
    started = started || first_kept < kThreads;
    inside = inside && outside == kThreads;
    __syncthreads();
  }
}

}  // namespace cmdp::cuda
