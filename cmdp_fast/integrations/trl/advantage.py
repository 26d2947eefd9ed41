"""From modified rewards to TRL's advantages: the group's baseline and scale, over the completions of all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast import objective
from cmdp_fast.trainer.experience import gathered_rows
from cmdp_fast.trainer.settings.constraint import Constraint

EPS = 1e-4  # TRL's, and that of `objective.grpo`


def task_rewards(rewards: Tensor, weights: Tensor, group_size: int) -> Tensor:
    """One task reward a completion [N], from those of each function [N, F], where NaN means no opinion.

    A completion on which no function has an opinion gets the mean of its group: the task says nothing for or against
    it, and only the constraint acts.
    """
    total = (rewards * weights.to(rewards.device)).nansum(1)
    groups = torch.where(rewards.isnan().all(1), torch.nan, total).unflatten(0, (-1, group_size))
    neutral = groups.nanmean(1, keepdim=True).nan_to_num(0.0)
    return torch.where(groups.isnan(), neutral, groups).flatten()


def sequence_advantages(returns: Tensor, group_size: int, scale_rewards: str) -> objective.GroupAdvantage:
    """`objective.grpo` of the returns [N] of all processes, scaled as TRL's ``scale_rewards`` says.

    ``group``: by the group's deviation; ``batch``: by that of all returns; ``none``: not. A group of one, which only an
    evaluation may have, has nothing to be compared with: its advantage is 0.
    """
    if group_size == 1:
        return objective.GroupAdvantage(torch.zeros_like(returns), torch.ones_like(returns))
    advantage, by_group = objective.grpo(returns, group_size, EPS)
    if scale_rewards == "group":
        return objective.GroupAdvantage(advantage, by_group)
    scale = (returns.std() + EPS).expand_as(returns) if scale_rewards == "batch" else torch.ones_like(returns)
    return objective.GroupAdvantage(advantage * by_group / scale, scale)


def token_advantages(
    reward: Tensor,
    task_reward: Tensor,
    returns: Tensor,
    trace: cf.BudgetTrace,
    mask: Tensor,
    constraint: Constraint,
    *,
    baseline: str,
    scale_rewards: str,
    group_size: int,
    accelerator: Any,
) -> tuple[Tensor, Tensor]:
    """(advantage, scale), [B, T] and [B, 1], of this process's completions; the direct term is divided by the scale.

    ``reward`` is the modified reward and ``task_reward`` the task's, [B, T] each; ``returns`` [B] the modified return.
    """
    mine = slice(accelerator.process_index * len(reward), (accelerator.process_index + 1) * len(reward))
    if baseline == "position_rloo" and group_size > 1:
        part = objective.task_part(task_reward, trace, constraint.kind)
        score = objective.score_coefficient(reward, part, action_dependent=constraint.action_dependent, mask=mask)
        everywhere = gathered_rows(mask, accelerator)
        compared = objective.position_rloo(gathered_rows(score, accelerator), group_size, everywhere)
        return compared[mine, : mask.shape[1]], torch.ones_like(returns)[:, None]
    advantage, scale = sequence_advantages(gathered_rows(returns, accelerator), group_size, scale_rewards)
    return torch.where(mask, advantage[mine, None], 0.0), scale[mine, None]
