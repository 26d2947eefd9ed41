"""Cases of `cmdp_fast.objective`: padded rewards, costs and log-probabilities, held against loops over the tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast import objective
from cmdp_fast.reference import compute_dtype
from fuzzing import loops
from fuzzing.case import Case, Tensors
from fuzzing.completions import DTYPES, Completions, largest
from fuzzing.draws import Draw
from fuzzing.layouts import place
from fuzzing.of_budgets import UNEVEN
from fuzzing.of_logits import PER_TOKEN

OF_TRACES = ("cumulative", "remaining", "violated", "first_violation", "excess")
GAMMAS = (1.0, 0.9, 0.5, 0.0)


def _trace(tensors: Tensors) -> cf.BudgetTrace:
    return cf.BudgetTrace(*(tensors[name] for name in OF_TRACES))


def _of_a_row(*tensors: Tensor) -> float:
    """The largest sum of a row's sizes; at least 1."""
    total = sum(t.double().nan_to_num(0.0, 0.0, 0.0).abs().sum(-1) for t in tensors)
    return max(1.0, float(total.max())) if isinstance(total, Tensor) and total.numel() else 1.0


# --------------------------------------------------------------------------------------------------------------
# Returns and coefficients


def returns_to_go(c: Completions) -> Case:
    reward = c.numbers(*c.shape, special=(math.inf, -math.inf, math.nan))
    c.add("reward", reward)
    gamma = c.settings["gamma"] = c.draw.choice("gamma", GAMMAS)
    return c.case(
        lambda t: {"returns": objective.returns_to_go(t["reward"], mask=t.get("mask"), gamma=gamma)},
        lambda t: {"returns": c.each(lambda r, k: loops.returns(r, k, gamma), t["reward"], t["keep"])},
        size=_of_a_row(reward),
    )


def score_coefficient(c: Completions) -> Case:
    reward, task = (c.numbers(*c.shape, special=(math.inf, -math.inf)) for _ in range(2))
    c.add("reward", reward)
    c.add("task_part", task)
    gamma = c.settings["gamma"] = c.draw.choice("gamma", GAMMAS)
    sampled = c.settings["sampled"] = c.draw.chance("action_dependent", 0.4)
    constraint = cf.Constraint(budget=1.0, cost="k1" if sampled else "reverse_kl")
    return c.case(
        lambda t: {"score": objective.score_coefficient(**t, constraint=constraint, gamma=gamma)},
        lambda t: {
            "score": c.each(
                lambda r, task, k: loops.score(r, task, k, gamma, sampled), t["reward"], t["task_part"], t["keep"]
            )
        },
        size=_of_a_row(reward, task),
    )


def task_part(c: Completions) -> Case:
    constraint = c.add_trace()
    c.add("task_reward", c.numbers(*c.shape, special=(math.inf, math.nan)))
    return c.case(
        lambda t: {"part": objective.task_part(t["task_reward"], _trace(t), constraint, mask=t.get("mask"))},
        lambda t: {
            "part": c.each(
                lambda r, left, v, k: loops.task_part(r, left, v, k, constraint.kind),
                *(t[name] for name in ("task_reward", "remaining", "violated", "keep")),
            )
        },
    )


def direct_coefficient(c: Completions) -> Case:
    constraint = c.add_trace()
    return c.case(
        lambda t: {"direct": objective.direct_coefficient(_trace(t), constraint, mask=t.get("mask"))},
        lambda t: {
            "direct": c.each(
                lambda left, v, k: loops.direct(left, v, k, constraint), t["remaining"], t["violated"], t["keep"]
            )
        },
        computed=compute_dtype(c.given["cost"].memory),
    )


# --------------------------------------------------------------------------------------------------------------
# Advantages


def gae(c: Completions) -> Case:
    reward, value = c.numbers(*c.shape, special=(math.inf, -math.inf)), c.numbers(*c.shape)
    c.add("reward", reward)
    c.add("value", value)
    gamma, lam = (c.settings.setdefault(name, c.draw.choice(name, GAMMAS)) for name in ("gamma", "lam"))
    if c.draw.chance("beyond", 0.4):
        c.add("beyond", c.numbers(c.shape[0]))

    def truth(t: dict[str, Any]) -> dict[str, Any]:
        beyond = t.get("beyond", [0.0] * c.shape[0])
        rows = [
            loops.gae(*row, gamma=gamma, lam=lam, beyond=last)
            for *row, last in zip(t["reward"], t["value"], t["keep"], beyond, strict=True)
        ]
        return {name: c.tokens([row[i] for row in rows]) for i, name in enumerate(("advantage", "target"))}

    return c.case(
        lambda t: dict(zip(("advantage", "target"), objective.gae(**t, gamma=gamma, lam=lam), strict=True)),
        truth,
        size=3 * _of_a_row(reward, value) + 300.0,
    )


def whiten(c: Completions) -> Case:
    values = c.numbers(*c.shape)
    c.add("advantage", values)
    scale = loops.whiten(values.to(c.dtype).tolist(), c.keep.tolist())[1]
    size = max(1.0, largest(values)) / min(scale, 1.0)

    def truth(t: dict[str, Any]) -> dict[str, Any]:
        white, by = loops.whiten(t["advantage"], t["keep"])
        return {"advantage": c.tokens(white), "scale": by}

    return c.case(lambda t: objective.whiten(**t)._asdict(), truth, size=size)


def _of_groups(name: str) -> Callable[[Completions], Case]:
    def make(c: Completions) -> Case:
        size = c.settings["group_size"]
        scored = c.draw.chance("scored", 0.5)
        if scored:
            c.of_rows("scored", c.draw.choice("share that is scored", (0.6, 0.2)))
        by_position = name == "position_rloo"
        values = c.numbers(*(c.shape if by_position else c.shape[:1]))
        c.add("score" if by_position else "returns", values)
        if not by_position:
            c.given.pop("mask", None)

        def call(t: Tensors) -> Tensors:
            made = getattr(objective, name)(**t, group_size=size)
            return made._asdict() if name == "grpo" else {"advantage": made}

        def truth(t: dict[str, Any]) -> dict[str, Any]:
            of = t.get("scored")
            if name == "grpo":
                return dict(zip(("advantage", "scale"), loops.grpo(t["returns"], size, of, 1e-4), strict=True))
            if name == "rloo":
                return {"advantage": loops.rloo(t["returns"], size, of)}
            rows = [
                [x if kept else 0.0 for x, kept in zip(*row, strict=True)]
                for row in zip(t["score"], t["keep"], strict=True)
            ]
            columns = [loops.rloo([row[i] for row in rows], size, of) for i in range(c.shape[1])]
            back = [[column[i] for column in columns] for i in range(c.shape[0])]
            return {"advantage": torch.where(c.tokens(t["keep"]) > 0, c.tokens(back), 0.0)}

        scale = 1e-4 if name == "grpo" else 1.0
        return c.case(call, truth, size=max(1.0, largest(values)) / scale)

    return make


# --------------------------------------------------------------------------------------------------------------
# The loss


def ppo_loss(c: Completions) -> Case:
    c.dtype = c.draw.choice("dtype of the loss", DTYPES[:2])
    logprob = -c.numbers(*c.shape).abs().clamp(max=80.0)
    c.add("logprob", logprob)
    c.add("old_logprob", logprob + c.draw.normal(*c.shape) * c.draw.choice("apart", (0.01, 0.3, 10.0)))
    c.add("advantage", c.numbers(*c.shape))
    if c.draw.chance("direct term", 0.6):
        c.add("cost", c.numbers(*c.shape).abs())
        c.add("direct", c.numbers(*c.shape).abs())
    low, high = (c.settings.setdefault(name, c.draw.choice(name, (0.2, 0.1, 0.9))) for name in ("low", "high"))
    n = c.settings["normalizer"] = c.draw.choice("normalizer", (None, 7.0))

    def call(t: Tensors) -> Tensors:
        of = [t[name].detach().clone().requires_grad_() for name in ("logprob", "cost") if name in t]
        given = t | dict(zip(("logprob", "cost"), of, strict=False))
        given["mask"] = t.get("mask")
        loss, metrics = objective.ppo_loss(**given, clip_low=low, clip_high=high, normalizer=n)
        assert not any(value.requires_grad for value in metrics.values())
        gradients = torch.autograd.grad(loss, of)
        metrics = {name: value.to(c.dtype) for name, value in metrics.items()}
        return {"loss": loss, **metrics, **dict(zip(("gradient", "gradient of the cost"), gradients, strict=False))}

    def truth(t: dict[str, Any]) -> dict[str, Any]:
        found = loops.ppo(t, t["keep"], low, high, n)
        return {name: c.tokens(value) if name.startswith("gradient") else value for name, value in found.items()}

    terms = _of_a_row(*(c.given[name].view() for name in ("logprob", "advantage"))) ** 2
    return c.case(call, truth, size=max(100.0, terms * c.shape[0]))


# --------------------------------------------------------------------------------------------------------------
# Metrics


def constraint_metrics(c: Completions) -> Case:
    c.add_trace()
    alpha = c.settings["alpha"] = c.draw.choice("alpha", (1.0, 0.5, 0.25))
    for name in ("correct", "weighted", "mean_budget"):
        c.settings[name] = c.draw.chance(name, 0.5)
    if c.settings["correct"]:
        c.of_rows("correct", 0.5)
    if c.settings["weighted"]:
        c.add("weight", c.draw.integers(5, c.shape[0]) / 4, torch.float32)
    limit, computed = c.draw.choice("limit", (UNEVEN, 0.5, 2.0)), compute_dtype(c.given["cost"].memory)
    optional = ("mask", "correct", "weight")

    def call(t: Tensors) -> Tensors:
        given = {name: t[name] for name in optional if name in t}
        bound = limit if c.settings["mean_budget"] else None
        made = objective.constraint_metrics(t["cost"], _trace(t), alpha=alpha, mean_budget=bound, **given)
        assert all(value.shape == () for value in made.values())
        return {name: value.to(computed) for name, value in made.items()}

    def truth(t: dict[str, Any]) -> dict[str, Any]:
        rounded = torch.tensor(limit, dtype=torch.float64).to(computed).item()
        limits = [rounded] * c.shape[0] if c.settings["mean_budget"] else None
        return loops.metrics(t["cost"], t, t["keep"], t.get("correct"), limits, alpha, t.get("weight"))

    size = _of_a_row(c.given["cost"].view(), c.given["remaining"].view())
    return c.case(call, truth, size=size, computed=computed)


def cvar(c: Completions) -> Case:
    _few(c)
    values = c.numbers(c.shape[0], special=(math.inf, -math.inf, math.nan))
    c.add("values", values)
    alpha = c.settings["alpha"] = c.draw.choice("alpha", (1.0, 0.5, 0.25))
    if c.draw.chance("weighted", 0.5):
        c.add("weight", c.draw.integers(5, c.shape[0]) / 4, torch.float32)
    return c.case(
        lambda t: {"cvar": objective.cvar(**t, alpha=alpha)},
        lambda t: {"cvar": loops.tail(t["values"], alpha, t.get("weight"))},
        size=_of_a_row(values) * 4,
    )


def weighted_mean(c: Completions) -> Case:
    _few(c)
    values = c.numbers(c.shape[0], special=(math.inf, -math.inf, math.nan))
    c.add("values", values)
    if c.draw.chance("weighted", 0.7):
        c.add("weight", c.draw.integers(5, c.shape[0]) / 4)
    return c.case(
        lambda t: {"mean": objective.weighted_mean(**t)},
        lambda t: {"mean": loops.mean(t["values"], t.get("weight"))},
        size=_of_a_row(values) * 4,
    )


def _few(c: Completions) -> None:
    """Values without tokens."""
    c.given.pop("mask", None)
    c.keep = torch.ones(c.shape, dtype=torch.bool)
    c.dtype = c.draw.choice("dtype of values", DTYPES[:2])


# --------------------------------------------------------------------------------------------------------------
# Another sampler


def sampler_log_ratio(c: Completions) -> Case:
    logprob, drawn = (-c.numbers(*c.shape, special=(-math.inf, *more)).abs() for more in ((), (math.nan,)))
    c.add("logprob", logprob)
    c.add("sampler_logprob", drawn)
    return c.case(
        lambda t: {"ratio": objective.sampler_log_ratio(**t)},
        lambda t: {
            "ratio": c.each(lambda *row: [*map(loops.log_ratio, *row)], t["logprob"], t["sampler_logprob"], t["keep"])
        },
        size=max(1.0, largest(logprob) + largest(drawn)),
        computed=torch.promote_types(c.dtype, torch.float32),
    )


def _ratios(c: Completions) -> tuple[float, float]:
    """Log-ratios as an argument, the clip of their weights, and of how large sums these are made."""
    c.dtype = c.draw.choice("dtype of ratios", DTYPES[:2])
    ratio = c.numbers(*c.shape, special=(-math.inf, loops.LARGEST))
    c.add("log_ratio", ratio if c.draw.chance("far apart", 0.2) else ratio.clamp(max=3.0))
    clip = c.settings["clip"] = c.draw.choice("clip", (2.0, 1.0, 1e6))
    return clip, 4 * _of_a_row(ratio.where(ratio < 1e29, 0.0)) * max(1, c.shape[0])


def sampler_weight(c: Completions) -> Case:
    clip, size = _ratios(c)
    mode = c.settings["mode"] = c.draw.choice("mode of weights", ("token", "sequence"))
    c.given.pop("mask", None)

    def truth(t: dict[str, Any]) -> dict[str, Any]:
        rows = t["log_ratio"] if mode == "token" else [[sum(row)] for row in t["log_ratio"]]
        made = torch.tensor([[loops.truncated(x, clip) for x in row] for row in rows], dtype=torch.float64)
        return {"weight": made.reshape(c.shape[0], c.shape[1] if mode == "token" else 1)}

    return c.case(lambda t: {"weight": objective.sampler_weight(t["log_ratio"], mode, clip=clip)}, truth, size=size)


def estimate_weight(c: Completions) -> Case:
    clip, size = _ratios(c)
    return c.case(
        lambda t: {"weight": objective.estimate_weight(**t, clip=clip)},
        lambda t: {"weight": loops.estimate(t["log_ratio"], t["keep"], clip)},
        size=size,
    )


def sampler_metrics(c: Completions) -> Case:
    clip, size = _ratios(c)
    mode = c.settings["mode"] = c.draw.choice("mode of metrics", (None, "token", "sequence"))
    c.given.setdefault("mask", place(c.draw, c.keep, "mask", PER_TOKEN))
    return c.case(
        lambda t: objective.sampler_metrics(**t, mode=mode, clip=clip),
        lambda t: loops.sampler_metrics(t["log_ratio"], t["keep"], mode, clip),
        size=size,
    )


GROUPED = ("grpo", "rloo", "position_rloo")
MAKERS: dict[str, Callable[[Completions], Case]] = {
    make.__name__: make
    for make in (
        *(returns_to_go, score_coefficient, task_part, direct_coefficient, gae, whiten, ppo_loss, constraint_metrics),
        *(cvar, weighted_mean, sampler_log_ratio, sampler_weight, estimate_weight, sampler_metrics),
    )
} | {name: _of_groups(name) for name in GROUPED}


def objective_case(draw: Draw) -> Case:
    """A case of one of the functions."""
    name = draw.choice("function of the objective", tuple(MAKERS))
    group = draw.choice("group_size", (2, 3, 8)) if name in GROUPED else 1
    completions = Completions(draw, group, empty=name != "constraint_metrics")
    completions.settings = {"name": name} | ({"group_size": group} if name in GROUPED else {})
    return MAKERS[name](completions)
