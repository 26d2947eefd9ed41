"""The modified reward of a token, and of every token of a trace that exists already."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cmdp_fast.arrays import settled_account, settled_rewarding, settled_trace
from cmdp_fast.kernels import launch
from cmdp_fast.kernels.direct import direct
from cmdp_fast.kernels.finish import kept
from cmdp_fast.kernels.sequences import Sequences, Tokens, bounds, compiled, cost_of, previous
from cmdp_fast.kernels.shapes import Lanes, constants
from cmdp_fast.layout import Account, BudgetRule, Rewarding, RewardRule, TokenTrace
from cmdp_fast.reference import BudgetTrace

# The kinds that share a formula; where they differ (penalty_at, the cost) is decided by the caller.
FORMULA = {"worst_case": "saute", "pid": "lagrangian"}


class Formula(NamedTuple):
    """The parts of a `BudgetRule` and a `RewardRule` that are known when a kernel is compiled."""

    discounted: bool
    mean: bool
    inclusive: bool
    per_token: bool  # a budget is that of one token
    unrounded: bool  # a budget is as the caller gave it, not of the costs' dtype
    kind: str
    at_crossing: bool


class Amounts(NamedTuple):
    """The numbers of a `RewardRule`, doubles."""

    penalty: float
    discrepancy_weight: float
    coefficient: float
    barrier_slope: float


class Moment(NamedTuple):
    """Where unmasked tokens stand, ``[CHUNK]`` doubles and bools."""

    task_reward: Lanes
    cost: Lanes
    cumulative: Lanes
    remaining: Lanes
    remaining_before: Lanes
    excess: Lanes
    violated: Lanes
    crossing: Lanes  # the first violation
    started: Lanes  # not the sequence's first token
    inside: Lanes  # the barrier has not been crossed yet


@triton.jit
def weighed(weight, amount):
    """An amount as often as its weight says: 0 of it is nothing, even where it is infinite."""
    return tl.where(weight == 0.0, 0.0, weight * amount)


@triton.jit
def reward_of(moment, formula, amounts):
    """The modified reward of the unmasked tokens of a `Moment`, after a `Formula` and its `Amounts`."""
    given, cost, remaining = moment.task_reward, moment.cost, moment.remaining
    charged = moment.crossing if formula.at_crossing else moment.violated
    paid = tl.where(charged, amounts.penalty, 0.0)
    charge = weighed(amounts.discrepancy_weight, moment.excess) + weighed(amounts.coefficient, cost)
    if formula.kind == "cmdp":
        return tl.where(moment.violated, 0.0, given) - paid - charge
    elif formula.kind == "hinge":
        return given - charge
    elif formula.kind == "saute":
        return tl.where(moment.violated, 0.0, given) - paid
    elif formula.kind == "lagrangian":
        return given - weighed(amounts.coefficient, cost)
    else:  # barrier: log(1 - C_t/d) - log(1 - C_{t-1}/d) = log(remaining_t / remaining_{t-1}), and remaining_0 = d
        before = tl.where(moment.started, moment.remaining_before, remaining + moment.cumulative)
        # An infinite budget has no barrier.
        step = tl.log(tl.where(moment.inside & (remaining != float("inf")), remaining / before, 1.0))
        return tl.where(
            moment.inside, given + weighed(amounts.coefficient, step), -weighed(amounts.barrier_slope, cost)
        )


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@direct
@triton.jit(do_not_specialize=["width", "total"])
def reward_kernel(
    offsets,
    width,
    total,
    tokens,
    trace,
    reward,
    penalty: tl.float64,
    discrepancy_weight: tl.float64,
    coefficient: tl.float64,
    barrier_slope: tl.float64,
    formula,
    CHUNK: tl.constexpr,
):
    """The modified reward of a sequence from a trace that exists already. Arguments: as `scan.scan_kernel`."""
    amounts = Amounts(penalty, discrepancy_weight, coefficient, barrier_slope)
    begin, length = bounds(offsets, width, total, tl.program_id(0))
    last = tl.full([], -1, tl.int32)
    outside = length
    for start in range(0, length, CHUNK):
        i = start + tl.arange(0, CHUNK)
        at = begin + i
        real = i < length
        keep = kept(at, real, tokens.mask)
        before = i - 1  # the last unmasked token before each: a masked one's entries may be any
        if tokens.mask is not None:
            upto = tl.maximum(tl.associative_scan(tl.where(keep, i, -1), 0, larger), last)
            before = previous(upto, last)
            last = tl.max(upto, 0)
        earlier = keep & (before >= 0)
        left = tl.load(trace.remaining + at, mask=real, other=0.0).to(tl.float64)
        violated = tl.load(trace.violated + at, mask=real, other=0) != 0
        violated_before = tl.load(trace.violated + begin + before, mask=earlier, other=0) != 0
        if formula.kind == "barrier":
            outside = tl.minimum(outside, tl.min(tl.where(keep & (~(left > 0)), i, length), 0))
        moment = Moment(
            tl.load(tokens.task_reward + at, mask=keep, other=0.0).to(tl.float64),
            cost_of(tokens, at, keep),
            tl.load(trace.cumulative + at, mask=keep, other=0.0).to(tl.float64),
            left,
            tl.load(trace.remaining + begin + before, mask=earlier, other=0.0).to(tl.float64),
            tl.load(trace.excess + at, mask=keep, other=0.0).to(tl.float64),
            violated,
            violated & (~violated_before),
            earlier,
            i < outside,
        )
        value = tl.where(keep, reward_of(moment, formula, amounts), 0.0)
        tl.store(reward + at, value.to(reward.dtype.element_ty), mask=real)


SUM = BudgetRule(gamma=1.0, mean=False, inclusive=False)


def formula_of(budget: BudgetRule, reward: RewardRule, per_token: bool = False, unrounded: bool = False) -> Formula:
    """The rules as a kernel is compiled for them."""
    kind = FORMULA.get(reward.kind, reward.kind)
    discounted = budget.gamma != 1.0
    known = Formula(discounted, budget.mean, budget.inclusive, per_token, unrounded, kind, reward.at_crossing)
    return constants(known)


def amounts_of(rule: RewardRule) -> tuple[float, float, float, float]:
    """The numbers of a rule, in the order of a kernel's arguments."""
    return rule.penalty, rule.discrepancy_weight, rule.coefficient, rule.barrier_slope


def in_bytes(trace: BudgetTrace | TokenTrace) -> BudgetTrace | TokenTrace:
    """A trace as the kernels see it: bools are bytes."""
    return trace._replace(violated=trace.violated.view(torch.uint8))


def modify_rewards(account: Account, trace: TokenTrace, rewarding: Rewarding) -> None:
    """Writes the modified reward of every token of a trace that exists already."""
    sequences = account.offsets.shape[0] - 1
    if sequences == 0:
        return
    account = settled_account(account)
    trace, rewarding = settled_trace(trace, account.cost), settled_rewarding(rewarding, account.cost)
    with launch.on(account.cost):
        reward_kernel[(sequences,)](
            *Sequences(account.offsets, 0, account.cost.numel()),
            Tokens(account.cost, None, launch.flags(account.mask), rewarding.task_reward),
            in_bytes(trace),
            rewarding.reward,
            *amounts_of(rewarding.rule),
            formula_of(SUM, rewarding.rule),
            **compiled(),
        )
