"""The budget's account of every sequence and the modified reward of every token: one program per sequence.

The meanings stand in `cmdp_fast/reference.py` and `csrc/budget.h`. Sums are kept in double. A violation is absorbing,
so that `violated` needs no scan: it holds from the first token on that is over budget.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmdp_fast.arrays import array, settled_account, settled_rewarding
from cmdp_fast.kernels import launch
from cmdp_fast.kernels.direct import direct
from cmdp_fast.kernels.finish import kept
from cmdp_fast.kernels.reward import Amounts, Moment, amounts_of, formula_of, in_bytes, reward_of
from cmdp_fast.kernels.sequences import Sequences, Tokens, bounds, compiled, cost_of, previous, running
from cmdp_fast.kernels.shapes import Pointer
from cmdp_fast.layout import Account, BudgetRule, Rewarding, RewardRule
from cmdp_fast.reference import BudgetTrace, KindName

NO_REWARD = RewardRule(cast(KindName, "none"), False, 0.0, 0.0, 0.0, 0.0)


class Budgets(NamedTuple):
    """The budgets of sequences, if each has its own."""

    given: Pointer | None  # [B], of any floating dtype
    stride: int


class Allowance(NamedTuple):
    """What may be spent."""

    budgets: Budgets
    budget: float  # of every sequence, if none has its own
    per_token: bool  # that is the budget of one token
    unrounded: bool  # that is as the caller gave it


@triton.jit
def count_kept(begin, length, mask, CHUNK: tl.constexpr):
    """How many tokens of a sequence count."""
    if mask is None:
        return length
    else:
        counted = tl.zeros([CHUNK], tl.int32)
        for start in range(0, length, CHUNK):
            i = start + tl.arange(0, CHUNK)
            counted += kept(begin + i, i < length, mask).to(tl.int32)
        return tl.sum(counted, 0)


@triton.jit
def discounted(cost, number, gamma_octaves, formula):
    """What a token pays into the account: its cost, discounted by the `number` of unmasked tokens before it."""
    if formula.discounted:
        paid = cost * tl.exp2(gamma_octaves * number.to(tl.float64))
        return tl.where(tl.abs(cost) == float("inf"), cost, paid)  # the discount is not 0 where it underflows
    else:
        return cost


@triton.jit
def mean_or_sum(account, number, formula):
    if formula.mean:
        return account / tl.maximum(number, 1).to(tl.float64)
    else:
        return account


@triton.jit
def overrun_of(account, limit):
    return tl.where(account <= limit, 0.0, account - limit)


# If the compiler knew that every sequence begins at a multiple of 16 tokens, it would give a thread several of them,
# and the sums would be added in another order than those of packed sequences. So `width` and `total` stand alone and
# are not specialised; `budget` and the amounts stand alone because they are doubles.
@direct
@triton.jit(do_not_specialize=["width", "total"])
def scan_kernel(
    offsets,
    width,
    total,
    budgets,
    budget: tl.float64,
    tokens,
    trace,
    reward,
    gamma_octaves: tl.float64,
    penalty: tl.float64,
    discrepancy_weight: tl.float64,
    coefficient: tl.float64,
    barrier_slope: tl.float64,
    formula,
    CHUNK: tl.constexpr,
):
    """Writes the trace of one sequence, and unless `reward` is None the reward, computed from the trace as it was
    rounded.

    offsets, width, total: `Sequences`. budgets, budget: those of an `Allowance`. tokens: `Tokens`. trace: a
    `BudgetTrace` of pointers. reward: [tokens] or None. formula: a `Formula`, with the discount in octaves and the
    `Amounts`.

    The account of a token is what stood before it, which one scan tells, and what it pays. So a token that costs
    nothing leaves the account as it was (a float64 cost: to a rounding), and nothing is handed from one thread to the
    next but the sums.
    """
    dtype: tl.constexpr = trace.cumulative.dtype.element_ty
    counting: tl.constexpr = formula.discounted or formula.mean or formula.kind == "barrier"
    sequence = tl.program_id(0)
    begin, length = bounds(offsets, width, total, sequence)
    limit = tl.zeros([], tl.float64) + budget
    if budgets.given is not None:
        limit = tl.load(budgets.given + sequence.to(tl.int64) * budgets.stride).to(tl.float64)
    if formula.unrounded:  # as the costs are rounded: a cost of 0.3 is within a budget of 0.3
        limit = limit.to(dtype).to(tl.float64)
    if formula.per_token:  # and the sum of so many such costs, which is not rounded, within as many such budgets
        counted = count_kept(begin, length, tokens.mask, CHUNK)
        limit = tl.where(counted > 0, limit * counted.to(tl.float64), 0.0)
    amounts = Amounts(penalty, discrepancy_weight, coefficient, barrier_slope)
    spent = tl.zeros([], tl.float64)
    count = tl.zeros([], tl.int32)
    remaining_before = tl.zeros([], tl.float64)
    first = length
    outside = length
    for start in range(0, length, CHUNK):
        i = start + tl.arange(0, CHUNK)
        at = begin + i
        real = i < length
        keep = kept(at, real, tokens.mask)
        keep_before = kept(at - 1, real & (i > 0), tokens.mask)
        cost = cost_of(tokens, at, keep)
        cost_before = cost_of(tokens, at - 1, keep_before)
        task_reward = 0.0
        if reward is not None:  # loaded before the first barrier
            task_reward = tl.load(tokens.task_reward + at, mask=keep, other=0.0).to(dtype).to(tl.float64)
        number = i  # of unmasked tokens before
        if counting and tokens.mask is not None:
            number, count = running(keep_before.to(tl.int32), count)
        before, spent = running(discounted(cost_before, tl.maximum(number - 1, 0), gamma_octaves, formula), spent)
        account = before + discounted(cost, number, gamma_octaves, formula)
        account = mean_or_sum(account, number + keep.to(tl.int32), formula)
        before = mean_or_sum(before, number, formula)
        # An infinite budget is none: nothing is over it, and all of it remains, even of an infinite sum.
        boundless = tl.where(account == account, limit, 0.0) == float("inf")
        # Written so that NaN, an account that cannot be compared, counts as a violation.
        if formula.inclusive:
            over = keep & (~(account < limit)) & (~boundless)
        else:
            over = keep & (~(account <= limit)) & (~boundless)
        first = tl.minimum(first, tl.min(tl.where(over, i, length), 0))
        overrun_before = overrun_of(before, limit)
        # Once the overrun is infinite nothing adds to it; the difference of two infinities would be NaN.
        excess = (overrun_of(account, limit) - overrun_before).to(dtype)
        excess = tl.where(keep & (overrun_before != float("inf")), excess, 0.0)
        cumulative, remaining = account.to(dtype), tl.where(boundless, limit, limit - account).to(dtype)
        violated = i >= first
        tl.store(trace.cumulative + at, cumulative, mask=real)
        tl.store(trace.remaining + at, remaining, mask=real)
        tl.store(trace.excess + at, excess, mask=real)
        tl.store(trace.violated + at, violated.to(tl.uint8), mask=real)
        if reward is not None:
            left = remaining.to(tl.float64)
            left_before = left
            if formula.kind == "barrier":
                outside = tl.minimum(outside, tl.min(tl.where(keep & (~(left > 0)), i, length), 0))
                left_before = previous(left, remaining_before)
                remaining_before = tl.sum(tl.where(i == start + CHUNK - 1, left, 0.0), 0)
            moment = Moment(
                task_reward,
                cost,
                cumulative.to(tl.float64),
                left,
                left_before,
                excess.to(tl.float64),
                violated,
                i == first,
                number > 0,
                i < outside,
            )
            value = tl.where(keep, reward_of(moment, formula, amounts), 0.0)
            tl.store(reward + at, value.to(dtype), mask=real)
    tl.store(trace.first_violation + sequence, first.to(tl.int64))


def scan_sequences(
    sequences: Sequences,
    allowance: Allowance,
    tokens: Tokens,
    rule: BudgetRule,
    trace: BudgetTrace,
    rewarding: Rewarding | None,
) -> None:
    """Launches the scan that writes the trace, and the modified reward if one is given."""
    count = trace.first_violation.shape[0]
    if count == 0:
        return
    paid, task_reward, reward = (NO_REWARD, None, None) if rewarding is None else rewarding
    with launch.on(trace.cumulative):
        scan_kernel[(count,)](
            *sequences,
            allowance.budgets,
            allowance.budget,
            tokens._replace(task_reward=task_reward),
            in_bytes(trace),
            reward,
            math.log2(rule.gamma),
            *amounts_of(paid),
            formula_of(rule, paid, allowance.per_token, allowance.unrounded),
            **compiled(),
        )


def trace_budgets(
    account: Account, limits: Tensor, rule: BudgetRule, trace: BudgetTrace, rewarding: Rewarding | None = None
) -> None:
    """Writes the trace, and the modified reward if one is given. ``limits``: ``[B]`` float64."""
    account = settled_account(account)
    limits = array("budget", limits, torch.float64, account.offsets.shape[0] - 1, account.cost.get_device())
    rewarding = None if rewarding is None else settled_rewarding(rewarding, account.cost)
    sequences = Sequences(account.offsets, 0, account.cost.numel())
    tokens = Tokens(account.cost, None, launch.flags(account.mask), None)
    scan_sequences(sequences, Allowance(Budgets(limits, 1), 0.0, False, False), tokens, rule, trace, rewarding)
