// Scans over sequences of tokens: the budget's trace and the modified reward. Sequences lie one after another;
// offsets [sequences + 1] say where each begins (the rows of a padded batch are sequences of equal length).
#pragma once

#include "../budget.h"

namespace cmdp {

// A float or double array.
struct Values {
  void* data;
  bool wide;

  double operator[](int64_t i) const {
    return wide ? static_cast<const double*>(data)[i] : static_cast<const float*>(data)[i];
  }
  // Returns what was written, so that whoever continues from it sees the rounded value.
  double set(int64_t i, double value) const {
    if (!wide) return static_cast<float*>(data)[i] = static_cast<float>(value);
    return static_cast<double*>(data)[i] = value;
  }
};

struct Sequences {
  const int64_t* start;
  int64_t count;
  const uint8_t* mask;  // 0 = masked; or null

  bool keeps(int64_t i) const { return mask == nullptr || mask[i] != 0; }
};

struct TraceArrays {
  Values cumulative, remaining, excess;
  uint8_t* violated;
  int64_t* first_violation;
};

// The trace of every sequence, and in the same scan, if `rule` is given, the modified reward. The reward is computed
// from the trace as it was written, so that it equals what modified_rewards() makes of that trace.
inline void trace_budgets(const Sequences& sequences, const Values& cost, const double* limits,
                          const BudgetRule& budget, const TraceArrays& out, const RewardRule* rule,
                          const Values& task_reward, const Values& reward) {
  for (int64_t s = 0; s < sequences.count; ++s) {
    const int64_t begin = sequences.start[s], end = sequences.start[s + 1];
    BudgetState account;
    RewardState rewards;
    account.limit = limits[s];
    out.first_violation[s] = end - begin;
    for (int64_t i = begin; i < end; ++i) {
      const bool keep = sequences.keeps(i);
      const BudgetStep step = keep ? account.push(cost[i], budget) : account.carry(budget);
      const RewardInput line{cost[i],
                             out.cumulative.set(i, step.cumulative),
                             out.remaining.set(i, step.remaining),
                             out.excess.set(i, step.excess),
                             step.violated,
                             step.crossing};
      out.violated[i] = step.violated;
      if (step.crossing) out.first_violation[s] = i - begin;
      if (rule != nullptr) reward.set(i, keep ? rewards.push(task_reward[i], line, *rule) : 0);
    }
  }
}

// The modified reward of every token from a trace that exists already.
inline void modify_rewards(const Sequences& sequences, const Values& cost, const TraceArrays& trace,
                           const RewardRule& rule, const Values& task_reward, const Values& reward) {
  for (int64_t s = 0; s < sequences.count; ++s) {
    RewardState rewards;
    bool before = false;
    for (int64_t i = sequences.start[s]; i < sequences.start[s + 1]; ++i) {
      if (!sequences.keeps(i)) {
        reward.set(i, 0);
        continue;
      }
      const bool violated = trace.violated[i] != 0;
      const RewardInput line{cost[i],  trace.cumulative[i], trace.remaining[i], trace.excess[i],
                             violated, violated && !before};
      before = violated;
      reward.set(i, rewards.push(task_reward[i], line, rule));
    }
  }
}

}  // namespace cmdp
