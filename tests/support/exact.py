"""Small problems whose trajectories can be enumerated, so that objective and gradient are exact sums, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cmdp_fast as ops  # the library as a user calls it: the native kernels where they are built
from cmdp_fast import objective
from cmdp_fast.constraint import KINDS
from cmdp_fast.reference import BudgetTrace, token_cost

VECTORS = Path(__file__).parents[1] / "vectors"


def vectors(name: str) -> dict[str, Any]:
    return json.loads((VECTORS / f"{name}.json").read_text())


@dataclass(frozen=True)
class Problem:
    """P trajectories of T tokens over V actions; ``state`` says which row of the policy's parameters acts where."""

    teacher: Tensor  # [S, V] probabilities
    state: Tensor  # [P, T]
    tokens: Tensor  # [P, T]
    reward: Tensor  # [P, T]


def bandit() -> Problem:
    data = vectors("bandit")
    reward = torch.tensor(data["reward"], dtype=torch.float64)
    actions = torch.arange(len(reward))
    return Problem(
        teacher=torch.tensor([data["teacher"]], dtype=torch.float64),
        state=torch.zeros(len(reward), 1, dtype=torch.long),
        tokens=actions[:, None],
        reward=reward[:, None],
    )


def tree() -> Problem:
    data = vectors("tree")
    reward = torch.tensor(data["reward"], dtype=torch.float64).flatten()
    tokens = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    return Problem(
        teacher=torch.tensor([data["teacher_root"], *data["teacher_child"]], dtype=torch.float64),
        state=torch.stack([torch.zeros(9, dtype=torch.long), 1 + tokens[:, 0]], dim=1),
        tokens=tokens,
        reward=torch.stack([torch.zeros(9, dtype=torch.float64), reward], dim=1),
    )


def tempered(problem: Problem, temperature: float) -> Problem:
    """The problem with the teacher's logits divided by a temperature."""
    return replace(problem, teacher=(problem.teacher.log() / temperature).softmax(-1))


def repeated(problem: Problem, times: int) -> Problem:
    """The problem several times in a row, each time from its first state; the mean of the rewards comes at the end.

    A policy is a table of as many states as before. Some path repeats the dearest one each time, so all paths are
    within ``times`` budgets if and only if those of the problem are within one: the best policy is the problem's, and
    so is its value.
    """
    paths = torch.cartesian_prod(*[torch.arange(len(problem.tokens))] * times).reshape(-1, times)
    reward = torch.zeros(paths.shape[0], times * problem.tokens.shape[1], dtype=problem.reward.dtype)
    reward[:, -1] = problem.reward.sum(1)[paths].mean(1)
    return replace(
        problem, state=problem.state[paths].flatten(1), tokens=problem.tokens[paths].flatten(1), reward=reward
    )


@dataclass(frozen=True)
class Setting:
    """A kind of modified reward with its parameters."""

    kind: str
    budget: float
    penalty: float = 1.0
    weight: float = 1.0
    coefficient: float | None = None
    cost: str = "reverse_kl"
    reduction: str = "sum"
    cost_gamma: float = 1.0

    @property
    def constraint(self) -> ops.Constraint:
        return ops.Constraint(
            budget=self.budget,
            cost=self.cost,
            kind=self.kind,
            penalty=self.penalty,
            discrepancy_weight=self.weight,
            coefficient=self.coefficient if KINDS[self.kind].coefficient else None,
            reduction=self.reduction,
            gamma=self.cost_gamma,
        )


@dataclass(frozen=True)
class Rollout:
    """Everything that one policy makes of every trajectory; logprob and cost are differentiable."""

    logprob: Tensor  # [P, T]
    cost: Tensor  # [P, T]
    trace: BudgetTrace
    reward: Tensor  # [P, T], modified
    probability: Tensor  # [P]

    @property
    def totals(self) -> Tensor:
        """C_T of every trajectory."""
        return self.trace.cumulative[:, -1]

    def expect(self, value: Tensor) -> Tensor:
        return (self.probability * value).sum()


def roll_out(problem: Problem, theta: Tensor, setting: Setting) -> Rollout:
    stats = ops.token_stats(theta[problem.state], problem.teacher.log()[problem.state], problem.tokens)
    cost = token_cost(stats, setting.cost)
    trace = ops.budget_trace(cost, constraint=setting.constraint)
    reward = ops.modified_reward(problem.reward, cost, trace, constraint=setting.constraint)
    return Rollout(stats.logprob, cost, trace, reward, stats.logprob.detach().sum(1).exp())


def exact_loss(problem: Problem, rollout: Rollout, setting: Setting, *, score_only: bool = False) -> Tensor:
    """`ppo_loss` at ratio 1 in which every trajectory counts by its probability: minus the objective's gradient."""
    share = rollout.probability[:, None]
    constraint = setting.constraint
    task = objective.task_part(problem.reward, rollout.trace, constraint)
    score = objective.score_coefficient(rollout.reward, task, constraint)
    direct = objective.direct_coefficient(rollout.trace, constraint)
    with_direct = not (score_only or constraint.action_dependent)
    loss, _ = objective.ppo_loss(
        rollout.logprob,
        rollout.logprob.detach(),
        share * score,
        mask=None,
        cost=rollout.cost if with_direct else None,
        direct=share * direct if with_direct else None,
        normalizer=1.0,
    )
    return loss


def ascend(
    problem: Problem,
    setting: Setting,
    *,
    start: Tensor | None = None,
    steps: int = 500,
    rate: float = 0.1,
    final: float = 1e-3,
    adapt: Callable[[Rollout, Setting], Setting] | None = None,
) -> tuple[Tensor, Rollout]:
    """Exact-gradient ascent with Adam from the teacher (or ``start``): the policy and its rollout.

    The rate falls geometrically to ``final`` of itself. At a budget the objective has a kink or a jump, across which
    the iterate hops to and fro by about the rate, so the last rate bounds how far from the edge it comes to rest.
    ``adapt`` may replace the setting before each step.
    """
    theta = (problem.teacher.log() if start is None else start).clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=rate, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, final ** (1.0 / steps))
    for _ in range(steps):
        rollout = roll_out(problem, theta, setting)
        if adapt is not None:
            setting = adapt(rollout, setting)
        optimizer.zero_grad()
        exact_loss(problem, rollout, setting).backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        return theta.softmax(-1), roll_out(problem, theta, setting)
