# pyright: strict
"""What somebody may write with this package, for type checkers: tests/test_types.py, and pyright in .ci/run."""

import dataclasses

import torch

import cmdp_fast as cf
from cmdp_fast import objective
from cmdp_fast.constraint import CostName, KindName
from cmdp_fast.pid import PIDController


def constraint_of(kind: KindName, cost: CostName = "reverse_kl") -> cf.Constraint:
    made = cf.Constraint(budget=2.0, kind=kind, cost=cost, penalty_at="crossing", reduction="sum", edge="strict")
    return dataclasses.replace(made, budget=3.0)


def worst_case_of(constraint: cf.Constraint) -> tuple[cf.Constraint, CostName]:
    worst = dataclasses.replace(constraint, kind="worst_case", cost="nll", reduction="mean")
    return worst, worst.cost


def loss_of(x: torch.Tensor, y: torch.Tensor, tokens: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    constraint = constraint_of("cmdp")
    out = cf.constrained_reward(x, y, tokens, reward, constraint=constraint)
    cost = cf.token_cost(out.stats, constraint.cost)
    worth = objective.grpo(out.reward.sum(1), group_size=2)
    loss, metrics = objective.ppo_loss(
        out.stats.logprob,
        out.stats.logprob.detach(),
        worth.advantage[:, None],
        mask=None,
        cost=cost,
        direct=objective.direct_coefficient(out.trace, constraint) / worth.scale[:, None],
    )
    return loss + metrics["approx_kl"] + cf.divergence(x, y, "jsd", beta=0.5).sum()


def by_keywords(x: torch.Tensor, y: torch.Tensor, tokens: torch.Tensor, price: PIDController) -> torch.Tensor:
    stats = cf.linear_token_stats(x, cf.Head(x[0]), y, y[0], tokens, saved="auto", student_softcap=30.0)
    trace = cf.budget_trace(stats.reverse_kl, 2.0, reduction="mean", edge="saute")
    reward = cf.modified_reward(stats.logprob, stats.reverse_kl, trace, kind="pid", coefficient=price.coefficient)
    verdict: torch.Tensor = cf.budget_verdict(stats.reverse_kl, stats.reverse_kl, 2.0).certified
    return torch.where(verdict[:, None], reward, trace.remaining)


def on_all(x: torch.Tensor, y: torch.Tensor, tokens: torch.Tensor) -> list[cf.TokenStats]:
    found = cf.available_backends()
    return [cf.token_stats(x, y, tokens, backend=name) for name, problem in found.items() if problem is None]
