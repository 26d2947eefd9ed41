"""What the functions of `cmdp_fast.objective` say, token after token, in Python's own numbers.

Written from their docstrings. Rows are lists of floats, ``keep`` lists of bools; a masked token is passed over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from cmdp_fast import Constraint

Row = list[float]
Keep = list[bool]
LARGEST = 1e30  # of a log-ratio


def times(weight: float, amount: float) -> float:
    """0 of an infinite amount is nothing."""
    return weight * amount if weight else 0.0


def real(keep: Keep) -> list[int]:
    return [t for t, kept in enumerate(keep) if kept]


def backwards(keep: Keep) -> Iterator[int]:
    return reversed(real(keep))


def returns(reward: Row, keep: Keep, gamma: float) -> Row:
    out, later = [0.0] * len(reward), 0.0
    for t in backwards(keep):
        later = out[t] = reward[t] + times(gamma, later)
    return out


def score(reward: Row, task: Row, keep: Keep, gamma: float, action_dependent: bool) -> Row:
    if action_dependent:
        return returns(reward, keep, gamma)
    out, later = [0.0] * len(reward), 0.0
    for t in backwards(keep):
        out[t] = task[t] + times(gamma, later)
        later = reward[t] + times(gamma, later)
    return out


def inside(remaining: Row, keep: Keep) -> int:
    """How many real tokens come before the first of those that have no budget left."""
    left = [remaining[t] > 0 for t in real(keep)]
    return left.index(False) if False in left else len(left)


def task_part(task: Row, remaining: Row, violated: Keep, keep: Keep, kind: str) -> Row:
    out, within = [0.0] * len(task), inside(remaining, keep)
    for number, t in enumerate(real(keep)):
        lost = violated[t] if kind in ("cmdp", "saute", "worst_case") else kind == "barrier" and number >= within
        out[t] = 0.0 if lost else task[t]
    return out


def direct(remaining: Row, violated: Keep, keep: Keep, constraint: Constraint) -> Row:
    out, tokens, kind = [0.0] * len(remaining), real(keep), constraint.kind
    price = constraint.coefficient or 0.0
    if not tokens or constraint.action_dependent or kind in ("saute", "worst_case"):
        return out
    mean, within = constraint.reduction == "mean", inside(remaining, keep)
    over = violated[tokens[-1]] and not remaining[tokens[-1]] > 0
    for number, t in enumerate(tokens):
        discounted = constraint.gamma**number
        if kind in ("lagrangian", "pid"):
            out[t] = price
        elif kind != "barrier":
            out[t] = price + over * constraint.discrepancy_weight * (1 / len(tokens) if mean else discounted)
        elif number < within:
            out[t] = price * (1 / within if mean else discounted) / remaining[tokens[within - 1]]
        else:
            out[t] = constraint.barrier_slope
    return out


def gae(reward: Row, value: Row, keep: Keep, gamma: float, lam: float, beyond: float) -> tuple[Row, Row]:
    advantage, target = [0.0] * len(reward), [0.0] * len(reward)
    after, later = beyond, 0.0
    for t in backwards(keep):
        later = advantage[t] = reward[t] + times(gamma, after) - value[t] + times(gamma * lam, later)
        target[t], after = later + value[t], value[t]
    return advantage, target


def deviation(values: Sequence[float]) -> float:
    """With one degree of freedom less."""
    middle = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


def whiten(advantage: list[Row], keep: list[Keep]) -> tuple[list[Row], float]:
    values = [row[t] for row, kept in zip(advantage, keep, strict=True) for t in real(kept)]
    if len(values) < 2:
        return [[0.0] * len(row) for row in advantage], 1.0
    middle, scale = math.fsum(values) / len(values), math.sqrt(deviation(values) ** 2 + 1e-8)
    return [
        [(x - middle) / scale if kept else 0.0 for x, kept in zip(row, of_row, strict=True)]
        for row, of_row in zip(advantage, keep, strict=True)
    ], scale


def grouped(values: Row, size: int, scored: Keep | None) -> Iterator[tuple[float, Row, int]]:
    """Of each member of a group its value, those of the others that it is compared with, and how many are compared."""
    for begin in range(0, len(values), size):
        group = range(begin, begin + size)
        compared = [i for i in group if scored is None or scored[i]] or [*group]
        for i in group:
            yield values[i], [values[j] for j in compared if j != i], len(compared)


def rloo(values: Row, size: int, scored: Keep | None) -> Row:
    return [x - math.fsum(others) / len(others) if others else 0.0 for x, others, _ in grouped(values, size, scored)]


def grpo(values: Row, size: int, scored: Keep | None, eps: float) -> tuple[Row, Row]:
    advantage, scales = [], []
    for x, others, count in grouped(values, size, scored):
        members = [*others, x] if len(others) < count else others
        scale = deviation(members) + eps if count > 1 else 1.0
        advantage.append((x - math.fsum(members) / count) / scale)
        scales.append(scale)
    return advantage, scales


def mean(values: Sequence[float], weight: Sequence[float] | None) -> float:
    weight = [1.0] * len(values) if weight is None else weight
    total = sum(weight)
    return sum(times(w, x) for w, x in zip(weight, values, strict=True)) / total if total else math.nan


def tail(values: Sequence[float], alpha: float, weight: Sequence[float] | None) -> float:
    """The mean of the largest share alpha; a NaN is the largest of all."""
    weight = [1.0] * len(values) if weight is None else weight
    size = left = alpha * sum(weight)
    worst = 0.0
    for x, w in sorted(zip(values, weight, strict=True), key=lambda pair: (pair[0] != pair[0], pair[0]), reverse=True):
        worst += times(max(min(w, left), 0.0), x)
        left -= w
    return worst / size if size else math.nan


def metrics(
    cost: list[Row],
    trace: dict[str, list[Any]],
    keep: list[Keep],
    correct: Keep | None,
    limit: Row | None,
    alpha: float,
    weight: Row | None,
) -> dict[str, float]:
    there = [i for i, kept in enumerate(keep) if any(kept)]
    names = ["constraint_satisfaction", "never_violated", "mean_excess", "mean_cumulative", "cvar", "mean_token_cost"]
    names += ["max_token_cost", "first_violation", *(["accuracy", "correct_and_feasible"] if correct else [])]
    if not there:
        return dict.fromkeys([*names, *(["prefix_satisfaction"] if limit else [])], math.nan)
    of = {i: real(keep[i]) for i in there}
    weight = None if weight is None else [weight[i] for i in there]
    total = [trace["cumulative"][i][of[i][-1]] for i in there]
    remaining = [trace["remaining"][i][of[i][-1]] for i in there]
    over = [[trace["violated"][i][t] for t in of[i]] for i in there]
    costs = [[cost[i][t] for t in of[i]] for i in there]
    every = [x for row in costs for x in row]
    out = {
        "constraint_satisfaction": mean([float(left >= 0) for left in remaining], weight),
        "never_violated": 1 - mean([float(any(row)) for row in over], weight),
        "mean_excess": mean([math.nan if left != left else max(-left, 0.0) for left in remaining], weight),
        "mean_cumulative": mean(total, weight),
        "cvar": tail(total, alpha, weight),
        "mean_token_cost": _ratio(mean([sum(row) for row in costs], weight), mean([len(r) for r in costs], weight)),
        "max_token_cost": math.nan if any(x != x for x in every) else max(every),
        "first_violation": 1 - mean([sum(row) / len(row) for row in over], weight),
    }
    if correct:
        out["accuracy"] = mean([float(correct[i]) for i in there], weight)
        both = [float(correct[i] and left >= 0) for i, left in zip(there, remaining, strict=True)]
        out["correct_and_feasible"] = mean(both, weight)
    if limit:
        kept = []
        for i, row in zip(there, costs, strict=True):
            spent, within = 0.0, True
            for number, x in enumerate(row, 1):
                spent += x
                within = within and spent / number <= limit[i]
            kept.append(float(within))
        out["prefix_satisfaction"] = mean(kept, weight)
    return out


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def log_ratio(logprob: float, sampler: float, kept: bool) -> float:
    if not kept or sampler != sampler:
        return 0.0
    return -math.inf if logprob == -math.inf else min(logprob - sampler, LARGEST)


def truncated(log_weight: float, clip: float) -> float:
    return math.exp(min(log_weight, math.log(clip)))


def estimate(log_ratios: list[Row], keep: list[Keep], clip: float) -> Row:
    """The weights of completions, divided by the largest."""
    logs = [
        min(sum(row[t] for t in real(kept)), math.log(clip)) if any(kept) else -math.inf
        for row, kept in zip(log_ratios, keep, strict=True)
    ]
    most = max(logs, default=-math.inf)
    return [math.nan if most == -math.inf else math.exp(x - most) for x in logs]


def sampler_metrics(log_ratios: list[Row], keep: list[Keep], mode: str | None, clip: float) -> dict[str, float]:
    rows = [[row[t] for t in real(kept)] for row, kept in zip(log_ratios, keep, strict=True) if any(kept)]
    every, name = [x for row in rows for x in row], "sampling/importance_sampling_ratio/"
    out = {
        "sampling/sampling_logp_difference/mean": mean([abs(x) for x in every], None),
        "sampling/sampling_logp_difference/max": max((abs(x) for x in every), default=math.nan),
    }
    if mode is None:
        return out
    of = every if mode == "token" else [sum(row) for row in rows]
    weights, whole = [truncated(x, clip) for x in of], estimate(rows, [[True] * len(row) for row in rows], clip)
    return out | {
        name + "min": min(weights, default=math.nan),
        name + "mean": mean(weights, None),
        name + "max": max(weights, default=math.nan),
        name + "clipped_ratio": mean([float(x > math.log(clip)) for x in of], None),
        "sampling/effective_sample_ratio": _ratio(sum(whole) ** 2, len(whole) * sum(w * w for w in whole)),
    }


def ppo(
    given: dict[str, list[Row]], keep: list[Keep], low: float, high: float, normalizer: float | None
) -> dict[str, Any]:
    """The loss, its gradients and what is reported beside it."""
    tokens, there = max(1, sum(map(sum, keep))), max(1, sum(map(any, keep)))
    n = there if normalizer is None else normalizer
    width = len(keep[0]) if keep else 0
    gradient, of_cost = ([[0.0] * width for _ in keep] for _ in range(2))
    sums = dict.fromkeys(("score", "direct", "low", "high", "kl"), 0.0)
    for i, kept in enumerate(keep):
        for t in real(kept):
            difference, worth = given["logprob"][i][t] - given["old_logprob"][i][t], given["advantage"][i][t]
            ratio = math.exp(difference)
            below, above = ratio < 1 - low and worth < 0, ratio > 1 + high and worth > 0
            factor = 1 - low if below else 1 + high if above else ratio
            sums["score"] -= times(worth, factor) / n
            sums["low"], sums["high"] = sums["low"] + below, sums["high"] + above
            sums["kl"] += math.expm1(difference) - difference
            gradient[i][t] = 0.0 if below or above else -worth * ratio / n
            if "cost" in given:
                sums["direct"] += times(given["direct"][i][t], given["cost"][i][t]) / n
                of_cost[i][t] = given["direct"][i][t] / n
    return {
        "loss": sums["score"] + sums["direct"],
        "loss/score": sums["score"],
        "loss/direct": sums["direct"],
        "clip_ratio/low_mean": sums["low"] / tokens,
        "clip_ratio/high_mean": sums["high"] / tokens,
        "clip_ratio/region_mean": (sums["low"] + sums["high"]) / tokens,
        "approx_kl": sums["kl"] / tokens,
        "gradient": gradient,
        **({"gradient of the cost": of_cost} if "cost" in given else {}),
    }
