"""The worth of each token of a completion under a constraint, which all trainers need between reward and loss.

B completions of up to T tokens are padded to [B, T] with a boolean ``mask``; rewards and costs are in nats. Nothing
here is differentiable. The formulas are those of `cmdp_fast.objective`. Here are the completions of a prompt, in groups
of any size and order, and the places where a completion ends.

A completion that is alone in its group is compared with nothing. At its positions it keeps the whole score (a baseline
of 0, which is unbiased); its return as a whole is worth 0, as in TRL, where only an evaluation has such groups.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cmdp_fast import objective
from cmdp_fast.constraint import Constraint
from cmdp_fast.errors import InputError
from cmdp_fast.field_docs import documented
from cmdp_fast.objective import GroupAdvantage
from cmdp_fast.ops.budget import budget_trace, modified_reward
from cmdp_fast.reference import BudgetTrace

EPS = 1e-4  # beside a deviation: TRL's, and that of `objective.grpo`


@documented
class Credit(NamedTuple):
    """The result of `constrained_advantage`: tensors [B, T], detached, and the budget's trace."""

    advantage: Tensor
    """What each token is worth compared with the other completions of its group, [B, T]."""
    reward: Tensor
    """The modified reward of each token, [B, T]."""
    returns: Tensor
    """The modified reward from each token on, discounted, [B, T]."""
    trace: BudgetTrace
    """The account of the budget."""


def constrained_advantage(
    task_reward: Tensor,
    cost: Tensor,
    constraint: Constraint,
    *,
    groups: Sequence[Hashable],
    mask: Tensor,
    gamma: float = 1.0,
) -> Credit:
    """The advantage of every token under the modified reward: its `score` less that of the other completions of its
    group at the same position (`less_others`), not divided by any deviation.

    ``task_reward``, ``cost`` (nats) and the boolean ``mask`` are [B, T], ``groups`` names the prompt of each of the B
    rows; within a group column t has to be the same position of the completion. ``gamma`` discounts the reward.
    """
    cost = cost.detach()
    trace = budget_trace(cost, constraint=constraint, mask=mask)
    reward = modified_reward(task_reward, cost, trace, constraint=constraint, mask=mask)
    worth = score(reward, task_reward, trace, constraint, mask=mask, gamma=gamma)
    returns = objective.returns_to_go(reward, mask=mask, gamma=gamma)
    return Credit(less_others(worth, groups, mask), reward, returns, trace)


def score(
    reward: Tensor,
    task_reward: Tensor,
    trace: BudgetTrace,
    constraint: Constraint,
    *,
    mask: Tensor,
    gamma: float = 1.0,
) -> Tensor:
    """`objective.score_coefficient` [B, T] of a modified reward [B, T], the task's [B, T] and the budget's trace."""
    part = objective.task_part(task_reward, trace, constraint, mask=mask)
    return objective.score_coefficient(reward, part, constraint, mask=mask, gamma=gamma)


def less_others(score: Tensor, groups: Sequence[Hashable], mask: Tensor) -> Tensor:
    """`objective.position_rloo` [B, T] of scores [B, T] whose rows ``groups`` names, in groups of any size and order.

    A row without a real token belongs to no group: a batch may be filled up with such rows.
    """
    members: defaultdict[Hashable, list[int]] = defaultdict(list)
    for row, (group, real) in enumerate(zip(groups, mask.any(1).tolist(), strict=True)):
        if real:
            members[group].append(row)
    of_size: defaultdict[int, list[int]] = defaultdict(list)  # for one call per size: it takes groups of one size
    for rows in members.values():
        of_size[len(rows)].extend(rows)
    advantage = score.clone()
    for size, rows in of_size.items():
        if size > 1:
            index = torch.tensor(rows, device=score.device)
            advantage[index] = objective.position_rloo(score[index], size, mask[index])
    return advantage


def sequence_advantage(
    returns: Tensor,
    group_size: int,
    baseline: Literal["grpo", "rloo"],
    scale: Literal["group", "batch", "none"] = "group",
    *,
    scored: Tensor | None = None,
) -> GroupAdvantage:
    """The worth of whole completions from their returns [N], ``group_size`` neighbours per prompt: advantages [N], and
    the divisor [N] that the direct term has to share.

    ``rloo`` is `objective.rloo`, undivided. ``grpo`` is `objective.grpo`, divided by the deviation of the ``group``, or
    by that of all returns (``batch``), or not (``none``). A group of one is worth 0, undivided. ``scored`` [N] bool:
    whose returns means and deviations are made of; the others are compared with them. Raises ValueError if the groups
    do not fit into N.
    """
    undivided = torch.ones_like(returns)
    if group_size == 1:
        return GroupAdvantage(torch.zeros_like(returns), undivided)
    if baseline == "rloo":
        return GroupAdvantage(objective.rloo(returns, group_size, scored=scored), undivided)
    advantage, by_group = objective.grpo(returns, group_size, EPS, scored=scored)
    if scale == "group":
        return GroupAdvantage(advantage, by_group)
    of_batch = objective.grpo(returns, len(returns), EPS, scored=scored).scale
    divisor = of_batch if scale == "batch" else undivided
    return GroupAdvantage(advantage * by_group / divisor, divisor)


@documented
class TaskRewards(NamedTuple):
    """The task's rewards of N completions."""

    reward: Tensor
    """A number for each, [N]."""
    scored: Tensor
    """Whether that number is the task's own, [N] bool."""


def task_rewards(rewards: Tensor, weights: Tensor, group_size: int, *, deducted: Tensor | float = 0.0) -> TaskRewards:
    """One task reward per completion [N], from those of each function [N, F], where NaN means no opinion: the sum, with
    ``weights`` [F], over the functions that have one, as TRL's, less what is ``deducted`` [N] from it.

    A completion on which no function has an opinion is not scored. TRL leaves it out of the group's mean and deviation
    and gives it an advantage of 0. Here it is left out of them as well, and its own reward is the mean of its group's
    scored ones (0 without any), with nothing deducted: the task says nothing for or against it, and only the constraint
    acts. A function of weight 0, which is there to be logged, scores no completion, unless none has another weight; in
    TRL it makes the reward of one that has no other opinion 0. ``group_size`` neighbours are a group.

    Raises InputError for an infinite reward, in all processes: nothing can be compared with it, and its group's
    advantages would be NaN. (TRL makes them 0, or 3e38 without a division.)
    """
    if rewards.isinf().any():
        raise InputError("a reward function returned an infinite reward (in float32); expected finite numbers or None")
    weights = weights.to(rewards)
    total = ((rewards * weights).nansum(1) - deducted).unflatten(0, (-1, group_size))
    if not total.isfinite().all():
        raise InputError("the weighted rewards of a completion add up to infinity (in float32)")
    counts = (weights != 0) | (weights == 0).all()
    scored = (counts & ~rewards.isnan()).any(1).unflatten(0, (-1, group_size))
    return TaskRewards(torch.where(scored, total, mean_of_scored(total, scored)).flatten(), scored.flatten())


def mean_of_scored(values: Tensor, scored: Tensor) -> Tensor:
    """The mean [G, 1] of those ``values`` [G, n] of each group that are ``scored`` [G, n], 0 without any.

    It is summed up as the baseline is, to the last bit: the difference is multiplied by up to 1e4.
    """
    return torch.where(scored, values, 0.0).sum(1, keepdim=True) / scored.sum(1, keepdim=True).clamp(min=1)


def position_advantage(
    score: Tensor, unconstrained: Tensor, group_size: int, mask: Tensor, scored: Tensor | None = None
) -> Tensor:
    """`objective.position_rloo` [B, T] of scores [B, T] in contiguous groups.

    ``scored`` [B] bool (None: all are) says which completions have a reward of the task's own. The baseline falls where
    completions end, so one that has none would get an advantage from its length: it is compared by what the constraint
    has made of the task reward alone, the score less ``unconstrained``, the return of the task reward
    (broadcast to [B, T]).
    """
    compared = objective.position_rloo(score, group_size, mask, scored=scored)
    if scored is None:
        return compared
    by_constraint = objective.position_rloo(score - unconstrained, group_size, mask, scored=scored)
    return torch.where(scored[:, None], compared, by_constraint)


def last_token(mask: Tensor) -> Tensor:
    """Where a completion has its last real token, [B, T] bool; masked tokens may stand before it. A completion may have
    none."""
    following = mask.long().flip(1).cumsum(1).flip(1)
    return mask & (following == 1)


def at_last_token(value: Tensor, mask: Tensor) -> Tensor:
    """float32 [B, T] with value [B] at the last real token of each completion and 0 elsewhere."""
    return torch.where(last_token(mask), value[:, None].float(), 0.0)


def of_last_token(value: Tensor, mask: Tensor) -> Tensor:
    """The value [B] that each completion has in [B, T] at its last real token; 0 for one that has none."""
    return torch.where(last_token(mask), value, 0.0).sum(1)
