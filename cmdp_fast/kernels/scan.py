"""The budget's account of every sequence and the modified reward of every token: one program per sequence.

The meanings stand in `cmdp_fast/reference.py` and `csrc/budget.h`. A sequence is read in chunks of a fixed size, so
that it comes out the same whether it is padded or packed; sums are kept in double. A violation is absorbing, so that
`violated` needs no scan: it holds from the first token on that is over budget.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmdp_fast.kernels import launch
from cmdp_fast.kernels.direct import direct
from cmdp_fast.kernels.finish import kept
from cmdp_fast.kernels.shapes import Lanes, Pointer, constants
from cmdp_fast.layout import Account, BudgetRule, Rewarding, RewardRule, TokenTrace
from cmdp_fast.reference import BudgetTrace

CHUNK = 1024
WARPS = 4
# The kinds that share a formula; where they differ (penalty_at, the cost) is decided by the caller.
FORMULA = {"worst_case": "saute", "pid": "lagrangian"}


class Sequences(NamedTuple):
    """Where sequences lie in tensors of a number per token."""

    offsets: Pointer | None  # [B+1]: where each begins; None: all have the same width
    tokens: int


class Tokens(NamedTuple):
    """The numbers of each token ``[tokens]`` that a scan reads."""

    plus: Pointer | None  # the cost is plus - minus, which is how `cmdp_fast.reference.token_cost` rounds it too
    minus: Pointer | None
    mask: Pointer | None  # bytes
    task_reward: Pointer | None


class Formula(NamedTuple):
    """The parts of a `BudgetRule` and a `RewardRule` that are known when a kernel is compiled."""

    discounted: bool
    mean: bool
    inclusive: bool
    kind: str
    at_crossing: bool


class Amounts(NamedTuple):
    """The numbers of a `RewardRule`, doubles."""

    penalty: float
    discrepancy_weight: float
    coefficient: float
    barrier_slope: float


class Span(NamedTuple):
    """One sequence."""

    sequence: Lanes  # its number
    begin: Lanes  # its first token
    length: Lanes
    limit: Lanes  # its budget


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
def bounds(sequences, sequence):
    """Where a sequence begins and ends. Offsets may be unchecked; they must not lead outside of the tensors."""
    begin = tl.maximum(tl.load(sequences.offsets + sequence).to(tl.int64), 0)
    return begin, tl.minimum(tl.load(sequences.offsets + sequence + 1).to(tl.int64), sequences.tokens)


@triton.jit
def previous(x, first):
    """x shifted by one token; `first` comes before the chunk."""
    index = tl.arange(0, x.shape[0])
    return tl.where(index == 0, first, tl.gather(x, tl.maximum(index - 1, 0), 0))


@triton.jit
def last(x):
    """The last value of a chunk."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0]) == x.shape[0] - 1, x, 0.0), 0)


@triton.jit
def reward_of(moment, formula, amounts):
    """The modified reward of the unmasked tokens of a `Moment`, after a `Formula` and its `Amounts`."""
    given, cost, remaining = moment.task_reward, moment.cost, moment.remaining
    charged = moment.crossing if formula.at_crossing else moment.violated
    paid = tl.where(charged, amounts.penalty, 0.0)
    if formula.kind == "cmdp":
        return tl.where(moment.violated, 0.0, given) - paid - amounts.discrepancy_weight * moment.excess
    elif formula.kind == "hinge":
        return given - amounts.discrepancy_weight * moment.excess
    elif formula.kind == "saute":
        return tl.where(moment.violated, 0.0, given) - paid
    elif formula.kind == "lagrangian":
        return given - amounts.coefficient * cost
    else:  # barrier: log(1 - C_t/d) - log(1 - C_{t-1}/d) = log(remaining_t / remaining_{t-1}), and remaining_0 = d
        before = tl.where(moment.started, moment.remaining_before, remaining + moment.cumulative)
        # An infinite budget has no barrier.
        step = tl.log(tl.where(moment.inside & (remaining != float("inf")), remaining / before, 1.0))
        return tl.where(moment.inside, given + amounts.coefficient * step, -amounts.barrier_slope * cost)


@triton.jit
def cost_of(tokens, at, mask):
    """The cost as the operations before have rounded it: plus, -minus or plus - minus."""
    # The compiler leaves out a branch whose condition is known, but not a statement that follows a return.
    if tokens.minus is None:
        cost = tl.load(tokens.plus + at, mask=mask, other=0.0)
    elif tokens.plus is None:
        cost = -tl.load(tokens.minus + at, mask=mask, other=0.0)
    else:
        cost = tl.load(tokens.plus + at, mask=mask, other=0.0) - tl.load(tokens.minus + at, mask=mask, other=0.0)
    return cost.to(tl.float64)


@triton.jit
def scan_sequence(span, tokens, trace, reward, formula, gamma_octaves, amounts, CHUNK: tl.constexpr):
    """Writes the trace of one sequence, and unless `reward` is None the reward, computed from the trace as it was
    rounded.

    span: a `Span`. tokens: `Tokens`. trace: a `BudgetTrace` of pointers. reward: [tokens] or None. formula: a
    `Formula`, with the discount in octaves and the `Amounts`.
    """
    length, limit = span.length, span.limit
    total = tl.zeros([], tl.float64)
    overrun_before = tl.zeros([], tl.float64)
    remaining_before = tl.zeros([], tl.float64)
    count = tl.zeros([], tl.int64)
    first = length
    outside = length
    for start in range(0, length, CHUNK):
        i = start + tl.arange(0, CHUNK).to(tl.int64)
        at = span.begin + i
        real = i < length
        keep = kept(at, real, tokens.mask)
        cost = cost_of(tokens, at, keep)
        number = count + tl.cumsum(keep.to(tl.int64), 0)
        paid = cost
        if formula.discounted:
            paid = cost * tl.exp2(gamma_octaves * (number - 1).to(tl.float64))
        paid = tl.where(keep, paid, 0.0)
        sums = total + tl.cumsum(paid, 0)
        account = sums
        if formula.mean:
            account = sums / tl.maximum(number, 1).to(tl.float64)
        # Written so that NaN, an account that cannot be compared, counts as a violation.
        if formula.inclusive:
            over = keep & (~(account < limit))
        else:
            over = keep & (~(account <= limit))
        first = tl.minimum(first, tl.min(tl.where(over, i, length), 0))
        overrun = tl.where(account <= limit, 0.0, account - limit)
        before = previous(overrun, overrun_before)
        # Once the overrun is infinite nothing adds to it; the difference of two infinities would be NaN.
        added = tl.where(keep & (before != float("inf")), overrun - before, 0.0)
        left = limit - account
        violated = i >= first
        tl.store(trace.cumulative + at, account.to(trace.cumulative.dtype.element_ty), mask=real)
        tl.store(trace.remaining + at, left.to(trace.remaining.dtype.element_ty), mask=real)
        tl.store(trace.excess + at, added.to(trace.excess.dtype.element_ty), mask=real)
        tl.store(trace.violated + at, violated.to(tl.uint8), mask=real)
        if reward is not None:
            dtype = reward.dtype.element_ty
            rounded = left.to(trace.remaining.dtype.element_ty).to(tl.float64)
            if formula.kind == "barrier":
                outside = tl.minimum(outside, tl.min(tl.where(keep & (~(rounded > 0)), i, length), 0))
            moment = Moment(
                tl.load(tokens.task_reward + at, mask=keep, other=0.0).to(dtype).to(tl.float64),
                cost,
                account.to(trace.cumulative.dtype.element_ty).to(tl.float64),
                rounded,
                previous(rounded, remaining_before),
                added.to(trace.excess.dtype.element_ty).to(tl.float64),
                violated,
                i == first,
                number > 1,
                i < outside,
            )
            value = tl.where(keep, reward_of(moment, formula, amounts), 0.0)
            tl.store(reward + at, value.to(dtype), mask=real)
            remaining_before = last(rounded)
        total = last(sums)
        overrun_before = last(overrun)
        count = count + tl.sum(keep.to(tl.int64), 0)
    tl.store(trace.first_violation + span.sequence, first)


# The amounts stand alone because they are doubles.
@direct
@triton.jit
def trace_kernel(
    sequences,
    limits,
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
    """The trace of a sequence, and the modified reward unless `reward` is None.

    sequences: `Sequences`. limits: [B] doubles. The others: as `scan_sequence`.
    """
    sequence = tl.program_id(0)
    begin, stop = bounds(sequences, sequence)
    span = Span(sequence, begin, stop - begin, tl.load(limits + sequence))
    amounts = Amounts(penalty, discrepancy_weight, coefficient, barrier_slope)
    scan_sequence(span, tokens, trace, reward, formula, gamma_octaves, amounts, CHUNK)


@direct
@triton.jit
def reward_kernel(
    sequences,
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
    """The modified reward of a sequence from a trace that exists already. Arguments: as `trace_kernel`."""
    amounts = Amounts(penalty, discrepancy_weight, coefficient, barrier_slope)
    begin, stop = bounds(sequences, tl.program_id(0))
    length = stop - begin
    count = tl.zeros([], tl.int64)
    outside = length
    for start in range(0, length, CHUNK):
        i = start + tl.arange(0, CHUNK).to(tl.int64)
        at = begin + i
        real = i < length
        keep = kept(at, real, tokens.mask)
        number = count + tl.cumsum(keep.to(tl.int64), 0)
        earlier = keep & (i > 0)
        left = tl.load(trace.remaining + at, mask=real, other=0.0).to(tl.float64)
        violated = tl.load(trace.violated + at, mask=real, other=0) != 0
        violated_before = tl.load(trace.violated + at - 1, mask=earlier, other=0) != 0
        if formula.kind == "barrier":
            outside = tl.minimum(outside, tl.min(tl.where(keep & (~(left > 0)), i, length), 0))
        moment = Moment(
            tl.load(tokens.task_reward + at, mask=keep, other=0.0).to(tl.float64),
            cost_of(tokens, at, keep),
            tl.load(trace.cumulative + at, mask=keep, other=0.0).to(tl.float64),
            left,
            tl.load(trace.remaining + at - 1, mask=earlier, other=0.0).to(tl.float64),
            tl.load(trace.excess + at, mask=keep, other=0.0).to(tl.float64),
            violated,
            violated & (~violated_before),
            number > 1,
            i < outside,
        )
        value = tl.where(keep, reward_of(moment, formula, amounts), 0.0)
        tl.store(reward + at, value.to(reward.dtype.element_ty), mask=real)
        count = count + tl.sum(keep.to(tl.int64), 0)


SUM = BudgetRule(gamma=1.0, mean=False, inclusive=False)
NO_REWARD = RewardRule("none", False, 0.0, 0.0, 0.0, 0.0)


def formula_of(budget: BudgetRule, reward: RewardRule) -> Formula:
    """The rules as a kernel is compiled for them."""
    kind = FORMULA.get(reward.kind, reward.kind)
    return constants(Formula(budget.gamma != 1.0, budget.mean, budget.inclusive, kind, reward.at_crossing))


def amounts_of(rule: RewardRule) -> tuple[float, float, float, float]:
    """The numbers of a rule, in the order of a kernel's arguments."""
    return rule.penalty, rule.discrepancy_weight, rule.coefficient, rule.barrier_slope


def in_bytes(trace: BudgetTrace | TokenTrace) -> BudgetTrace | TokenTrace:
    """A trace as the kernels see it: bools are bytes."""
    return trace._replace(violated=trace.violated.view(torch.uint8))


def trace_budgets(
    account: Account, limits: Tensor, rule: BudgetRule, trace: BudgetTrace, rewarding: Rewarding | None = None
) -> None:
    """Writes the trace, and the modified reward if one is given. ``limits``: ``[B]`` float64."""
    sequences = account.offsets.shape[0] - 1
    if sequences == 0:
        return
    paid, task_reward, reward = (NO_REWARD, None, None) if rewarding is None else rewarding
    with launch.on(account.cost):
        trace_kernel[(sequences,)](
            Sequences(account.offsets, account.cost.numel()),
            limits,
            Tokens(account.cost, None, launch.flags(account.mask), task_reward),
            in_bytes(trace),
            reward,
            math.log2(rule.gamma),
            *amounts_of(paid),
            formula_of(rule, paid),
            CHUNK=CHUNK,
            **launch.compiled_for(WARPS),
        )


def modify_rewards(account: Account, trace: TokenTrace, rewarding: Rewarding) -> None:
    """Writes the modified reward of every token of a trace that exists already."""
    sequences = account.offsets.shape[0] - 1
    if sequences == 0:
        return
    with launch.on(account.cost):
        reward_kernel[(sequences,)](
            Sequences(account.offsets, account.cost.numel()),
            Tokens(account.cost, None, launch.flags(account.mask), rewarding.task_reward),
            in_bytes(trace),
            rewarding.reward,
            *amounts_of(rewarding.rule),
            formula_of(SUM, rewarding.rule),
            CHUNK=CHUNK,
            **launch.compiled_for(WARPS),
        )
