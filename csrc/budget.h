// The budget's account of one sequence, token by token, and the modified reward of each token.
// Header-only, free of any framework, double throughout. Shapes and meanings: cmdp_fast/ops/budget.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "token_state.h"  // CMDP_HD, CMDP_ISA

namespace cmdp {
inline namespace CMDP_ISA {

struct BudgetRule {
  double gamma;    // discount of the cost, 1 = plain sum
  bool mean;       // prefix mean instead of sum
  bool inclusive;  // a spent budget (C = d) already violates: Saute's own convention
};

struct BudgetStep {
  double cumulative, remaining, excess;
  bool violated, crossing;
};

// Absorbing: once a token has violated, every later one does. A masked token is simply not pushed.
struct BudgetState {
  double limit = 0, sum = 0, discount = 1;
  int64_t count = 0;
  bool violated = false;

  CMDP_HD double cumulative(const BudgetRule& rule) const { return rule.mean && count > 0 ? sum / count : sum; }
  // An infinite budget is none: nothing is over it, and all of it remains, even of an infinite sum.
  CMDP_HD bool boundless(double total) const { return limit == INFINITY && total == total; }
  CMDP_HD double remaining(double total) const { return boundless(total) ? limit : limit - total; }
  CMDP_HD double overrun(double total) const { return total > limit || total != total ? total - limit : 0; }

  // The account and nothing else: the one thing that has to be done token after token.
  CMDP_HD void pay(double cost, const BudgetRule& rule) {
    sum += std::isinf(cost) ? cost : discount * cost;  // of a discount that has underflowed, too: it is not 0
    discount *= rule.gamma;
    ++count;
  }

  CMDP_HD BudgetStep push(double cost, const BudgetRule& rule) {
    const double overrun_before = overrun(cumulative(rule));
    pay(cost, rule);
    const double total = cumulative(rule);
    // Written so that NaN, an account nobody checked, counts as a violation.
    const bool over = !boundless(total) && (rule.inclusive ? !(total < limit) : !(total <= limit));
    const bool crossing = over && !violated;
    violated = violated || over;
    // Once the overrun is infinite nothing adds to it; the difference of two infinities would be NaN.
    const double excess = std::isinf(overrun_before) ? 0 : overrun(total) - overrun_before;
    return {total, remaining(total), excess, violated, crossing};
  }

  // The step of a masked token: the account as it stands.
  CMDP_HD BudgetStep carry(const BudgetRule& rule) const {
    const double total = cumulative(rule);
    return {total, remaining(total), 0, violated, false};
  }
};

enum class RewardKind : int { cmdp, hinge, saute, lagrangian, barrier };

struct RewardRule {
  RewardKind kind;
  bool penalty_at_crossing;   // else at every violating token
  double penalty;             // n
  double discrepancy_weight;  // beta
  double coefficient;         // lambda, or kappa of the barrier
  double barrier_slope;       // price of a unit of cost outside the barrier
};

// Everything that the reward of a token may depend on, besides the task's reward: its cost and its line of the trace.
struct RewardInput {
  double cost, cumulative, remaining, excess;
  bool violated, crossing;
};

// An amount as often as its weight says: 0 of it is nothing, even where it is infinite.
CMDP_HD inline double weighed(double weight, double amount) { return weight == 0 ? 0 : weight * amount; }

// What cmdp and hinge pay for the cost of a token: for its part over the budget, and for all of it.
CMDP_HD inline double over_and_price(const RewardInput& in, const RewardRule& rule) {
  return weighed(rule.discrepancy_weight, in.excess) + weighed(rule.coefficient, in.cost);
}

struct RewardState {
  double remaining_before = 0;
  bool started = false, inside = true;  // barrier only: still within the budget

  CMDP_HD double push(double reward, const RewardInput& in, const RewardRule& rule) {
    const bool charged = rule.penalty_at_crossing ? in.crossing : in.violated;
    switch (rule.kind) {
      case RewardKind::cmdp:
        return (in.violated ? 0 : reward) - (charged ? rule.penalty : 0) - over_and_price(in, rule);
      case RewardKind::hinge:
        return reward - over_and_price(in, rule);
      case RewardKind::saute:
        return (in.violated ? 0 : reward) - (charged ? rule.penalty : 0);
      case RewardKind::lagrangian:
        return reward - weighed(rule.coefficient, in.cost);
      case RewardKind::barrier: {
        // log(1 - C_t/d) - log(1 - C_{t-1}/d) = log(remaining_t / remaining_{t-1}), and remaining_0 = d.
        const double before = started ? remaining_before : in.remaining + in.cumulative;
        started = true;
        remaining_before = in.remaining;
        inside = inside && in.remaining > 0;
        if (!inside) return -weighed(rule.barrier_slope, in.cost);
        // An infinite budget has no barrier.
        return reward + (std::isinf(in.remaining) ? 0 : weighed(rule.coefficient, std::log(in.remaining / before)));
      }
    }
    return 0;
  }
};

}  // namespace CMDP_ISA
}  // namespace cmdp
