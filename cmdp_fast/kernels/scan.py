"""The budget's account of every sequence and the modified reward of every token: one program a sequence.

The meanings stand in `cmdp_fast/reference.py` and `csrc/budget.h`. A sequence is read in chunks of a fixed size, so
that it comes out the same whether it is padded or packed; sums are kept in double. A violation is absorbing, so that
`violated` needs no scan: it holds from the first token on that is over budget.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmdp_fast.kernels import launch

CHUNK = 1024
WARPS = 4
# The kinds that share a formula; where they differ (penalty_at, the cost) is decided by the caller.
FORMULA = {"worst_case": "saute", "pid": "lagrangian"}


@triton.jit
def bounds(offsets, sequence, tokens):
    """Where a sequence begins and ends. Offsets that nobody has checked must not lead outside of the tensors."""
    begin = tl.maximum(tl.load(offsets + sequence).to(tl.int64), 0)
    return begin, tl.minimum(tl.load(offsets + sequence + 1).to(tl.int64), tokens)


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
def reward_of(
    given,
    cost,
    cumulative,
    remaining,
    remaining_before,
    excess,
    violated,
    crossing,
    started,
    inside,
    KIND: tl.constexpr,
    AT_CROSSING: tl.constexpr,
    amounts,
):
    """The modified reward of unmasked tokens. `inside`: the barrier has not been crossed yet."""
    penalty, weight, coefficient, slope = amounts
    charged = crossing if AT_CROSSING else violated
    paid = tl.where(charged, penalty, 0.0)
    if KIND == "cmdp":
        return tl.where(violated, 0.0, given) - paid - weight * excess
    elif KIND == "hinge":
        return given - weight * excess
    elif KIND == "saute":
        return tl.where(violated, 0.0, given) - paid
    elif KIND == "lagrangian":
        return given - coefficient * cost
    else:  # barrier: log(1 - C_t/d) - log(1 - C_{t-1}/d) = log(remaining_t / remaining_{t-1}), and remaining_0 = d
        before = tl.where(started, remaining_before, remaining + cumulative)
        # An infinite budget has no barrier.
        step = tl.log(tl.where(inside & (remaining != float("inf")), remaining / before, 1.0))
        return tl.where(inside, given + coefficient * step, -slope * cost)


@triton.jit
def cost_of(plus, minus, at, mask):
    """The cost as the operations before have rounded it: plus, -minus or plus - minus."""
    # The compiler leaves out a branch whose condition is known, but not what follows a return.
    if minus is None:
        cost = tl.load(plus + at, mask=mask, other=0.0)
    elif plus is None:
        cost = -tl.load(minus + at, mask=mask, other=0.0)
    else:
        cost = tl.load(plus + at, mask=mask, other=0.0) - tl.load(minus + at, mask=mask, other=0.0)
    return cost.to(tl.float64)


@triton.jit
def scan_sequence(
    sequence,
    begin,
    length,
    limit,
    plus,
    minus,
    mask,
    trace,
    task_reward,
    reward,
    gamma_octaves,
    DISCOUNTED: tl.constexpr,
    MEAN: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    KIND: tl.constexpr,
    AT_CROSSING: tl.constexpr,
    amounts,
    CHUNK: tl.constexpr,
):
    """The trace of one sequence, and unless `reward` is None the reward, computed from the trace as it was rounded."""
    cumulative, remaining, violated, first_violation, excess = trace
    total = tl.zeros([], tl.float64)
    overrun_before = tl.zeros([], tl.float64)
    remaining_before = tl.zeros([], tl.float64)
    count = tl.zeros([], tl.int64)
    first = length
    outside = length
    for start in range(0, length, CHUNK):
        i = start + tl.arange(0, CHUNK).to(tl.int64)
        at = begin + i
        real = i < length
        keep = real
        if mask is not None:
            keep = real & (tl.load(mask + at, mask=real, other=0) != 0)
        cost = cost_of(plus, minus, at, keep)
        number = count + tl.cumsum(keep.to(tl.int64), 0)
        paid = cost
        if DISCOUNTED:
            paid = cost * tl.exp2(gamma_octaves * (number - 1).to(tl.float64))
        paid = tl.where(keep, paid, 0.0)
        sums = total + tl.cumsum(paid, 0)
        account = sums
        if MEAN:
            account = sums / tl.maximum(number, 1).to(tl.float64)
        # Written so that NaN, an account nobody checked, counts as a violation.
        if INCLUSIVE:
            over = keep & (~(account < limit))
        else:
            over = keep & (~(account <= limit))
        first = tl.minimum(first, tl.min(tl.where(over, i, length), 0))
        overrun = tl.where(account <= limit, 0.0, account - limit)
        before = previous(overrun, overrun_before)
        # Once the overrun is infinite nothing adds to it; the difference of two infinities would be NaN.
        added = tl.where(keep & (before != float("inf")), overrun - before, 0.0)
        left = limit - account
        bad = i >= first
        tl.store(cumulative + at, account.to(cumulative.dtype.element_ty), mask=real)
        tl.store(remaining + at, left.to(remaining.dtype.element_ty), mask=real)
        tl.store(excess + at, added.to(excess.dtype.element_ty), mask=real)
        tl.store(violated + at, bad.to(tl.uint8), mask=real)
        if reward is not None:
            rounded = left.to(remaining.dtype.element_ty).to(tl.float64)
            if KIND == "barrier":
                outside = tl.minimum(outside, tl.min(tl.where(keep & (~(rounded > 0)), i, length), 0))
            value = reward_of(
                tl.load(task_reward + at, mask=keep, other=0.0).to(reward.dtype.element_ty).to(tl.float64),
                cost,
                account.to(cumulative.dtype.element_ty).to(tl.float64),
                rounded,
                previous(rounded, remaining_before),
                added.to(excess.dtype.element_ty).to(tl.float64),
                bad,
                i == first,
                number > 1,
                i < outside,
                KIND,
                AT_CROSSING,
                amounts,
            )
            tl.store(reward + at, tl.where(keep, value, 0.0).to(reward.dtype.element_ty), mask=real)
            remaining_before = last(rounded)
        total = last(sums)
        overrun_before = last(overrun)
        count = count + tl.sum(keep.to(tl.int64), 0)
    tl.store(first_violation + sequence, first)


@triton.jit
def trace_kernel(
    cost,
    mask,
    offsets,
    token_count,
    limits,
    trace,
    task_reward,
    reward,
    gamma_octaves: tl.float64,
    penalty: tl.float64,
    weight: tl.float64,
    coefficient: tl.float64,
    slope: tl.float64,
    DISCOUNTED: tl.constexpr,
    MEAN: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    KIND: tl.constexpr,
    AT_CROSSING: tl.constexpr,
    CHUNK: tl.constexpr,
):
    sequence = tl.program_id(0)
    begin, stop = bounds(offsets, sequence, token_count)
    length = stop - begin
    scan_sequence(
        sequence,
        begin,
        length,
        tl.load(limits + sequence),
        cost,
        None,
        mask,
        trace,
        task_reward,
        reward,
        gamma_octaves,
        DISCOUNTED,
        MEAN,
        INCLUSIVE,
        KIND,
        AT_CROSSING,
        (penalty, weight, coefficient, slope),
        CHUNK,
    )


@triton.jit
def reward_kernel(
    task_reward,
    cost,
    cumulative,
    remaining,
    violated,
    excess,
    mask,
    offsets,
    token_count,
    reward,
    penalty: tl.float64,
    weight: tl.float64,
    coefficient: tl.float64,
    slope: tl.float64,
    KIND: tl.constexpr,
    AT_CROSSING: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The modified reward of a sequence from a trace that exists already."""
    sequence = tl.program_id(0)
    begin, stop = bounds(offsets, sequence, token_count)
    length = stop - begin
    count = tl.zeros([], tl.int64)
    outside = length
    for start in range(0, length, CHUNK):
        i = start + tl.arange(0, CHUNK).to(tl.int64)
        at = begin + i
        real = i < length
        keep = real
        if mask is not None:
            keep = real & (tl.load(mask + at, mask=real, other=0) != 0)
        number = count + tl.cumsum(keep.to(tl.int64), 0)
        earlier = keep & (i > 0)
        left = tl.load(remaining + at, mask=real, other=0.0).to(tl.float64)
        bad = tl.load(violated + at, mask=real, other=0) != 0
        bad_before = tl.load(violated + at - 1, mask=earlier, other=0) != 0
        if KIND == "barrier":
            outside = tl.minimum(outside, tl.min(tl.where(keep & (~(left > 0)), i, length), 0))
        value = reward_of(
            tl.load(task_reward + at, mask=keep, other=0.0).to(tl.float64),
            tl.load(cost + at, mask=keep, other=0.0).to(tl.float64),
            tl.load(cumulative + at, mask=keep, other=0.0).to(tl.float64),
            left,
            tl.load(remaining + at - 1, mask=earlier, other=0.0).to(tl.float64),
            tl.load(excess + at, mask=keep, other=0.0).to(tl.float64),
            bad,
            bad & (~bad_before),
            number > 1,
            i < outside,
            KIND,
            AT_CROSSING,
            (penalty, weight, coefficient, slope),
        )
        tl.store(reward + at, tl.where(keep, value, 0.0).to(reward.dtype.element_ty), mask=real)
        count = count + tl.sum(keep.to(tl.int64), 0)


def budget_settings(gamma: float, mean: bool, inclusive: bool) -> dict[str, object]:
    return {
        "gamma_octaves": math.log2(gamma),
        "DISCOUNTED": gamma != 1.0,
        "MEAN": mean,
        "INCLUSIVE": inclusive,
    }


def reward_settings(
    kind: str, at_crossing: bool, penalty: float, weight: float, coefficient: float, slope: float
) -> dict[str, object]:
    return {
        "KIND": FORMULA.get(kind, kind),
        "AT_CROSSING": at_crossing,
        "penalty": penalty,
        "weight": weight,
        "coefficient": coefficient,
        "slope": slope,
    }


def room(trace: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The five fields of a trace as the kernels write them: bools are bytes."""
    return tuple(t.view(torch.uint8) if t.dtype == torch.bool else t for t in trace)


NO_REWARD = ("none", False, 0.0, 0.0, 0.0, 0.0)


def trace_budgets(
    cost: Tensor,
    mask: Tensor | None,
    offsets: Tensor,
    limits: Tensor,
    budget: tuple[float, bool, bool],
    trace: tuple[Tensor, ...],
    rule: tuple[str, bool, float, float, float, float] = NO_REWARD,
    task_reward: Tensor | None = None,
    reward: Tensor | None = None,
) -> None:
    """Writes the trace (cumulative, remaining, violated, first_violation, excess), and the reward if there is one."""
    sequences = offsets.shape[0] - 1
    if sequences == 0:
        return
    with launch.on(cost):
        trace_kernel[(sequences,)](
            cost,
            launch.flags(mask),
            offsets,
            cost.numel(),
            limits,
            room(trace),
            task_reward,
            reward,
            **budget_settings(*budget),
            **reward_settings(*rule),
            CHUNK=CHUNK,
            **launch.compiled_for(WARPS),
        )


def modify_rewards(
    task_reward: Tensor,
    cost: Tensor,
    trace: tuple[Tensor, Tensor, Tensor, Tensor],
    mask: Tensor | None,
    offsets: Tensor,
    rule: tuple[str, bool, float, float, float, float],
    reward: Tensor,
) -> None:
    """Writes the modified reward of every token; ``trace``: cumulative, remaining, violated, excess."""
    sequences = offsets.shape[0] - 1
    if sequences == 0:
        return
    cumulative, remaining, violated, excess = trace
    with launch.on(cost):
        reward_kernel[(sequences,)](
            task_reward,
            cost,
            cumulative,
            remaining,
            launch.flags(violated),
            excess,
            launch.flags(mask),
            offsets,
            cost.numel(),
            reward,
            **reward_settings(*rule),
            CHUNK=CHUNK,
            **launch.compiled_for(WARPS),
        )
