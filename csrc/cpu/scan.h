// Scans over sequences of tokens: the budget's trace and the modified reward.
#pragma once

#include "../arrays.h"
#include "../budget.h"
#include "../logits.h"

namespace cmdp {

// Sequences lie one after another; offsets [count + 1] tell where each begins (the rows of a padded batch are sequences
// of equal length).
struct Sequences {
  const int64_t* offsets;
  int64_t count;
  const uint8_t* mask;  // 0 = masked; or null
};

// The costs of all tokens, and per sequence the budget they count against.
struct Spending {
  Numbers cost;
  const double* limits;  // [sequences]
  BudgetRule rule;
};

// How the task's reward is modified, and where.
struct Reward {
  RewardRule rule;
  RewardArrays arrays;

  double push(RewardState& state, int64_t i, const RewardInput& line) const {
    return state.push(arrays.task_reward[i], line, rule);
  }
};

// The trace of every sequence, and in the same scan, if `reward` is given, the modified reward. The reward is computed
// from the trace as it was written, so that it equals the result of modify_rewards() on that trace.
inline void trace_budgets(const Sequences& sequences, const Spending& spending, const TraceArrays& out,
                          const Reward* reward) {
  for (int64_t s = 0; s < sequences.count; ++s) {
    const int64_t begin = sequences.offsets[s], end = sequences.offsets[s + 1];
    BudgetState account;
    RewardState rewards;
    account.limit = spending.limits[s];
    out.first_violation[s] = end - begin;
    for (int64_t i = begin; i < end; ++i) {
      const bool counts = unmasked(sequences.mask, i);
      const double cost = spending.cost[i];
      const BudgetStep step = counts ? account.push(cost, spending.rule) : account.carry(spending.rule);
      const RewardInput line{cost,
                             out.cumulative.set(i, step.cumulative),
                             out.remaining.set(i, step.remaining),
                             out.excess.set(i, step.excess),
                             step.violated,
                             step.crossing};
      out.violated[i] = step.violated;
      if (step.crossing) out.first_violation[s] = i - begin;
      if (reward != nullptr) reward->arrays.reward.set(i, counts ? reward->push(rewards, i, line) : 0);
    }
  }
}

// The modified reward of every token from a trace that exists already.
inline void modify_rewards(const Sequences& sequences, const Numbers& cost, const TraceArrays& trace,
                           const Reward& reward) {
  for (int64_t s = 0; s < sequences.count; ++s) {
    RewardState rewards;
    bool before = false;
    for (int64_t i = sequences.offsets[s]; i < sequences.offsets[s + 1]; ++i) {
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
