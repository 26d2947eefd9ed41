"""Advantages of completions under a constraint, for trainers that keep the completions of a prompt in any order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast import objective
from cmdp_fast.integrations.constraint import Constraint


class Credit(NamedTuple):
    """What `constrained_advantage` returns: tensors [B, T], detached, and the budget's trace."""

    advantage: Tensor
    reward: Tensor  # modified
    returns: Tensor  # of the modified reward, from each token on
    trace: cf.BudgetTrace


def constrained_advantage(
    task_reward: Tensor,
    cost: Tensor,
    constraint: Constraint,
    *,
    groups: Sequence[Hashable],
    mask: Tensor,
    gamma: float = 1.0,
) -> Credit:
    """The advantage of every token under the modified reward: `objective.score_coefficient` less the mean of the same
    position in the other completions of its group (`objective.position_rloo`), not divided by any deviation.

    ``task_reward``, ``cost`` (nats) and the boolean ``mask`` are [B, T], ``groups`` names the prompt of each of the B
    rows; within a group column t has to be the same position of the completion. A completion that is alone in its
    group has no baseline. A row without a real token belongs to no group.
    """
    trace = constraint.trace(cost, mask)
    reward = constraint.reward(task_reward, cost, trace, mask)
    score = objective.score_coefficient(
        reward,
        objective.task_part(task_reward, trace, constraint.kind),
        action_dependent=constraint.action_dependent,
        mask=mask,
        gamma=gamma,
    )
    returns = objective.returns_to_go(reward, mask=mask, gamma=gamma)
    return Credit(_less_others(score, groups, mask), reward, returns, trace)


def _less_others(score: Tensor, groups: Sequence[Hashable], mask: Tensor) -> Tensor:
    """One call of `position_rloo` for all groups of a size: it takes groups of one size, one after the other."""
    members: defaultdict[Hashable, list[int]] = defaultdict(list)
    for row, (group, real) in enumerate(zip(groups, mask.any(1).tolist(), strict=True)):
        if real:
            members[group].append(row)
    of_size: defaultdict[int, list[int]] = defaultdict(list)
    for rows in members.values():
        of_size[len(rows)].extend(rows)
    advantage = score.clone()
    for size, rows in of_size.items():
        if size > 1:
            index = torch.tensor(rows, device=score.device)
            advantage[index] = objective.position_rloo(score[index], size, mask[index])
    return advantage
