"""Training on the problems of exact.py by sampling, with nothing around it: no language model, no generation.

A sample is an index into the problem's paths, drawn by their exact probabilities, so a batch is a `Problem` of its own.
Scores, baselines and loss are the library's. A step is one update on fresh samples: the ratio is 1 and no clip acts.
tabular.py trains the same problems with the whole trainer, at ten times the cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from exact import Problem, Rollout, Setting, roll_out
from torch import Tensor

import cmdp_fast as ops
from cmdp_fast import objective
from cmdp_fast.objective import GroupAdvantage
from cmdp_fast.trainer.methods.kl_loss import k3


@dataclass(frozen=True)
class Method:
    """What is made of a batch: a modified reward, a baseline, and what is left out of the gradient."""

    setting: Setting
    baseline: Literal["position_rloo", "grpo"] = "position_rloo"
    pid_gains: tuple[float, float, float] = (1.0, 0.1, 0.0)  # for kind pid; costs are tenths of a nat
    k3: float = 0.0  # the weight of k3 in the loss, as GRPO has it
    long_term: bool = True  # whether an action answers for the costs of the states that it leads to; position_rloo's
    direct: bool = True  # whether the gradient goes through the costs themselves


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: Adam, whose rate falls to 0 in a straight line."""

    steps: int = 300
    completions: int = 256
    rate: float = 0.05


def path_probability(problem: Problem, logits: Tensor) -> Tensor:
    """Of every path under logits [..., S, V], [..., P]."""
    return logits.detach().log_softmax(-1)[..., problem.state, problem.tokens].sum(-1).exp()


def side_by_side(problem: Problem, paths: Tensor) -> Problem:
    """Paths [K, N] of as many copies of the problem, with K S states: a batch of K groups of N neighbours."""
    copies, size = paths.shape
    first = len(problem.teacher) * torch.arange(copies).repeat_interleave(size)[:, None]
    each = paths.flatten()
    return Problem(
        teacher=problem.teacher.repeat(copies, 1),
        state=first + problem.state[each],
        tokens=problem.tokens[each],
        reward=problem.reward[each],
    )


def worth(batch: Problem, rollout: Rollout, method: Method) -> Tensor:
    """What the action at each token is worth before a baseline is subtracted, [B, T]."""
    constraint = method.setting.constraint
    task = objective.task_part(batch.reward, rollout.trace, constraint)
    return objective.score_coefficient(rollout.reward if method.long_term else task, task, constraint)


def advantage_of(batch: Problem, rollout: Rollout, method: Method, size: int) -> GroupAdvantage:
    """By the method's baseline, over groups of so many neighbours: [B, T], and the number that it was divided by."""
    if method.baseline == "grpo":
        advantage, scale = objective.grpo(rollout.reward.sum(1), size)
        return GroupAdvantage(advantage[:, None].expand_as(rollout.reward), scale[:, None])
    return GroupAdvantage(
        objective.position_rloo(worth(batch, rollout, method), size), torch.ones_like(rollout.reward[:, :1])
    )


def loss_of(
    batch: Problem, rollout: Rollout, method: Method, size: int, credit: GroupAdvantage | None = None
) -> Tensor:
    """The sum of the losses of groups of so many neighbours: its gradient estimates that of minus the objective.

    ``credit`` stands in for the advantages of `advantage_of`.
    """
    constraint = method.setting.constraint
    advantage, scale = credit or advantage_of(batch, rollout, method, size)
    with_direct = method.direct and not constraint.action_dependent
    loss, _ = objective.ppo_loss(
        rollout.logprob,
        rollout.logprob.detach(),
        advantage,
        mask=None,
        cost=rollout.cost if with_direct else None,
        direct=objective.direct_coefficient(rollout.trace, constraint) / scale if with_direct else None,
        normalizer=size,
    )
    if method.k3:
        teacher = batch.teacher.log()[batch.state, batch.tokens]
        loss = loss + method.k3 * k3(rollout.logprob, teacher).sum() / size
    return loss


def train(
    problem: Problem,
    method: Method,
    schedule: Schedule,
    seeds: Sequence[int],
    *,
    start: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The logits [seeds, S, V] that trainings from the teacher's (or ``start``) end with, divided by the temperature.

    The problem's teacher is already at that temperature; the student's parameters are logits before the division, so a
    higher one makes its steps smaller, as in the trainer. Trainings of several seeds stand side by side and share
    nothing: Adam treats every number by itself. With pid lambda is one number, so there they follow each other.
    """
    if method.setting.kind == "pid" and len(seeds) > 1:
        options = {"start": start, "temperature": temperature}
        return torch.cat([train(problem, method, schedule, [seed], **options) for seed in seeds])
    logits = problem.teacher.log() if start is None else start
    theta = (temperature * logits).repeat(len(seeds), 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=schedule.rate)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1.0 - done / schedule.steps)
    random = [torch.Generator().manual_seed(seed) for seed in seeds]
    kp, ki, kd = method.pid_gains
    pid = objective.PIDController(kp=kp, ki=ki, kd=kd, initial_integral=method.setting.coefficient or 0.0)
    for _ in range(schedule.steps):
        shares = path_probability(problem, theta / temperature)
        draws = [
            torch.multinomial(share, schedule.completions, True, generator=own)
            for share, own in zip(shares, random, strict=True)
        ]
        batch = side_by_side(problem, torch.stack(draws))
        rollout = roll_out(batch, (theta / temperature).flatten(0, 1), method.setting)
        if method.setting.kind == "pid":
            method, rollout = _priced(batch, rollout, method, pid)
        optimizer.zero_grad()
        loss_of(batch, rollout, method, schedule.completions).backward()
        optimizer.step()
        decay.step()
    return (theta / temperature).detach()


def _priced(batch: Problem, rollout: Rollout, method: Method, pid: objective.PIDController) -> tuple[Method, Rollout]:
    """Method and rollout with the lambda that the controller sets by this batch, as `Learner.price` does."""
    pid.update(float(rollout.totals.mean()), method.setting.budget)
    setting = replace(method.setting, coefficient=pid.coefficient)
    reward = ops.modified_reward(batch.reward, rollout.cost, rollout.trace, constraint=setting.constraint)
    return replace(method, setting=setting), replace(rollout, reward=reward)
