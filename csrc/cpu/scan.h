// Scans over sequences of tokens: the budget's trace and the modified reward.
#pragma once

#include "../arrays.h"
#include "../budget.h"
#include "../logits.h"
#include "parallel.h"

namespace cmdp {

// Sequences lie one after another; offsets [count + 1] tell where each begins. Without offsets they are the rows of a
// padded batch, of equal length.
struct Sequences {
  const int64_t* offsets;
  int64_t count, width;  // the width is that of a row, where there are no offsets
  const uint8_t* mask;   // 0 = masked; or null

  int64_t begin(int64_t s) const { return offsets != nullptr ? offsets[s] : s * width; }
  int64_t tokens() const { return begin(count); }
};

// The costs of all tokens, and the budget that each sequence has to itself or all have alike.
struct Spending {
  Numbers cost;
  const double* limits;  // [sequences], or null
  double limit;
  BudgetRule rule;

  double limit_of(int64_t s) const { return limits != nullptr ? limits[s] : limit; }
};

// How the task's reward is modified, and where.
struct Reward {
  RewardRule rule;
  RewardArrays arrays;

  double push(RewardState& state, int64_t i, const RewardInput& line) const {
    return state.push(arrays.task_reward[i], line, rule);
  }
};

// From so many tokens on a scan is worth the start of threads, which takes the time of about 2000 tokens.
constexpr int64_t kTokensForThreads = 16384;

// An array of numbers whose type is known: a scan that asked for it at every token would take half as long again.
template <class Real>
struct Array {
  Real* values;

  explicit Array(const Numbers& numbers) : values(static_cast<Real*>(numbers.data)) {}
  double operator[](int64_t i) const { return values[i]; }
  double set(int64_t i, double value) const { return values[i] = static_cast<Real>(value); }
};

// The sequence s. Everything is taken by value: what is written could otherwise be what is read next.
template <class Real, bool kRewarded>
void trace_sequence(const Sequences& sequences, int64_t s, const Spending& spending, const TraceArrays& out,
                    const Reward* reward) {
  const int64_t begin = sequences.begin(s), end = sequences.begin(s + 1);
  const uint8_t* const mask = sequences.mask;
  const BudgetRule rule = spending.rule;
  const Array<Real> costs(spending.cost), cumulative(out.cumulative), remaining(out.remaining), excess(out.excess);
  uint8_t* const violated = out.violated;
  const RewardRule paid = kRewarded ? reward->rule : RewardRule{};
  const Array<Real> task_reward(kRewarded ? reward->arrays.task_reward : Numbers{});
  const Array<Real> rewards(kRewarded ? reward->arrays.reward : Numbers{});
  BudgetState account;
  RewardState state;
  account.limit = spending.limit_of(s);
  int64_t first_violation = end - begin;
  for (int64_t i = begin; i < end; ++i) {
    const bool counts = unmasked(mask, i);
    const double cost = costs[i];
    const BudgetStep step = counts ? account.push(cost, rule) : account.carry(rule);
    const RewardInput line{cost,
                           cumulative.set(i, step.cumulative),
                           remaining.set(i, step.remaining),
                           excess.set(i, step.excess),
                           step.violated,
                           step.crossing};
    violated[i] = step.violated;
    if (step.crossing) first_violation = i - begin;
    if (kRewarded) rewards.set(i, counts ? state.push(task_reward[i], line, paid) : 0);
  }
  out.first_violation[s] = first_violation;
}

// The trace of every sequence, and in the same scan, if `reward` is given, the modified reward. The reward is computed
// from the trace as it was written, so that it equals the result of modify_rewards() on that trace.
inline void trace_budgets(const Sequences& sequences, const Spending& spending, const TraceArrays& out,
                          const Reward* reward, int threads) {
  const auto scan = spending.cost.wide ? (reward ? trace_sequence<double, true> : trace_sequence<double, false>)
                                       : (reward ? trace_sequence<float, true> : trace_sequence<float, false>);
  const int used = sequences.tokens() < kTokensForThreads ? 1 : threads;
  parallel_for(sequences.count, used, 1, [&](int64_t s) { scan(sequences, s, spending, out, reward); });
}

// The modified reward of every token from a trace that exists already.
inline void modify_rewards(const Sequences& sequences, const Numbers& cost, const TraceArrays& trace,
                           const Reward& reward) {
  for (int64_t s = 0; s < sequences.count; ++s) {
    RewardState rewards;
    bool before = false;
    for (int64_t i = sequences.begin(s); i < sequences.begin(s + 1); ++i) {
      if (!unmasked(sequences.mask, i)) {
        reward.arrays.reward.set(i, 0);
        continue;
      }
      const bool violated = trace.violated[i] != 0;
      const RewardInput line{cost[i],  trace.cumulative[i], trace.remaining[i], trace.excess[i],
                             violated, violated && !before};
      before = violated;
      reward.arrays.reward.set(i, reward.push(rewards, i, line));
    }
  }
}

}  // namespace cmdp
