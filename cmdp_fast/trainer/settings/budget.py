"""The constraint: cost, budget and the modified reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cmdp_fast.reference import CostName, KindName

from .ranges import FROM_0_TO_1, NOT_NEGATIVE, POSITIVE
from .units import FRACTION, GAINS, NAMED_NATS, NATS, NATS_PER_TOKEN, PRICE, REWARDS, STEPS


@dataclass(frozen=True)
class BudgetSettings:
    """The constraint: cost, budget and the modified reward."""

    budget: Annotated[float, POSITIVE, NATS] = 2.0
    """The cumulative cost that a completion may have."""
    teacher_budgets: Annotated[tuple[str, ...], NAMED_NATS] = ()
    """The budget of the completions of each teacher, of several, as `NAME=NATS`; of one that is not named `budget`."""
    budget_per_token: bool = False
    """The budget is in nats per token of the completion, so that a long one may spend more."""
    budget_start: Annotated[float, NOT_NEGATIVE, NATS] = 0.0
    """The budget at the first step, from which it goes to `budget` in a straight line over `budget_steps`. 0: no such
    schedule."""
    budget_steps: Annotated[int, NOT_NEGATIVE, STEPS] = 0
    """Length of that schedule. 0: the budget is `budget` from the beginning. Evaluations always use `budget`."""
    prefix_budget: Annotated[float, NOT_NEGATIVE, NATS_PER_TOKEN] = 0.0
    """The bound, in nats per token, on the teacher's mean negative log-likelihood over any prefix of a completion.
    `worst_case` keeps to it, and `prefix_satisfaction` reports it. 0: neither."""
    cost: CostName = "reverse_kl"
    """Cost of a token. The first three are exact divergences with a direct gradient. The others look at the sampled
    token alone, of probability p to the student and q to the teacher: k1 is `log(p/q)`, k3 is `q/p - 1 - log(q/p)` and
    nll is `-log(q)`."""
    cost_clamp: Annotated[float, NOT_NEGATIVE, NATS] = 0.0
    """The largest size in nats of a token's cost, for k1, k3 and nll: k3 of a single token may be 1e13. 0: as it is."""
    jsd_beta: Annotated[float, FROM_0_TO_1, FRACTION] = 0.5
    """Beta of the cost `jsd` and of the loss of `gkd`: 0 is forward KL, 1 reverse KL."""
    kind: KindName = "cmdp"
    """The modified reward: the price of being over the budget."""
    penalty: Annotated[float, NOT_NEGATIVE, REWARDS] = 1.0
    """Paid for crossing the budget (cmdp: once; saute, worst_case: at each token from there on), in `reward_unit`."""
    discrepancy_weight: Annotated[float, NOT_NEGATIVE, PRICE] = 1.0
    """Price of a nat over the budget (cmdp, hinge), in `reward_unit`."""
    budget_price: Annotated[float, NOT_NEGATIVE, REWARDS] = 0.5
    """What spending the whole budget costs (cmdp, hinge): a nat costs so much divided by `budget`, within the budget
    too, whatever a schedule or a teacher of its own has for a budget; with `budget_per_token` divided by that of
    `max_new_tokens`. 0: nothing, as in the paper."""
    reward_unit: Literal["auto", "range", "one"] = "auto"
    """The unit of `penalty`, `discrepancy_weight`, `budget_price`, `coefficient` and `pid_gains`. range: the difference
    between the best and the worst task reward of the run so far, so that they mean the same whatever the task pays, and
    n = 1 is the most that a violation can gain. one: the task's reward as it is. auto: range, and one for lagrangian,
    whose coefficient is then what other trainers call beta."""
    coefficient: Annotated[float, NOT_NEGATIVE, PRICE] = 0.0
    """The multiplier of lagrangian (0: the task's reward alone), that from which pid's controller starts, or the weight
    of k3 in the loss of kl_loss. For the barrier the weight of log(1 - spent/budget): reward units, not per nat."""
    kl_loss_correction: bool = False
    """Whether kl_loss multiplies k3 by the ratio of the student to itself at the sampling, and differentiates that too:
    the gradient is then that of reverse KL at each state. TRL 1.16 does so unless `use_bias_correction_kl=False`."""
    pid_gains: Annotated[tuple[float, float, float], GAINS] = (0.1, 0.01, 0.01)
    """Proportional, integral and derivative gain of the pid controller, which sets lambda by a step's completions
    before the update; per nat by which their mean cost exceeds their mean budget."""
