"""From modified rewards to TRL's advantages: the group's baseline and scale, over the completions of all processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from cmdp_fast import batches, objective
from cmdp_fast.credit import sequence_advantage

if TYPE_CHECKING:
    from accelerate import Accelerator


def task_rewards(rewards: Tensor, weights: Tensor, group_size: int) -> Tensor:
    """One task reward per completion [N], from those of each function [N, F], where NaN means no opinion.

    A completion on which no function has an opinion gets the mean of its group: the task says nothing for or against
    it, and only the constraint acts.
    """
    total = (rewards * weights.to(rewards.device)).nansum(1)
    groups = torch.where(rewards.isnan().all(1), torch.nan, total).unflatten(0, (-1, group_size))
    neutral = groups.nanmean(1, keepdim=True).nan_to_num(0.0)
    return torch.where(groups.isnan(), neutral, groups).flatten()


def position_advantages(score: Tensor, mask: Tensor, group_size: int, accelerator: Accelerator) -> Tensor:
    """`objective.position_rloo` [B, T] of this process's completions; a group may be spread over processes.

    ``score`` [B, T] is that of `credit.score`. An evaluation may have groups of one: 0, nothing to compare with.
    """
    if group_size == 1:
        return torch.zeros_like(score)
    everyones, everywhere = batches.gathered((score, mask), accelerator)
    compared = objective.position_rloo(everyones, group_size, everywhere)
    return compared[batches.of_this_process(len(mask), accelerator), : mask.shape[1]]


def sequence_advantages(
    returns: Tensor,
    mask: Tensor,
    group_size: int,
    accelerator: Accelerator,
    baseline: Literal["grpo", "rloo"],
    scale_rewards: Literal["group", "batch", "none"] = "none",
) -> tuple[Tensor, Tensor]:
    """`credit.sequence_advantage` of this process's returns [B]: (advantage [B, T], scale [B, 1])."""
    advantage, scale = sequence_advantage(batches.gathered(returns, accelerator), group_size, baseline, scale_rewards)
    mine = batches.of_this_process(len(mask), accelerator)
    return torch.where(mask, advantage[mine, None], 0.0), scale[mine, None]
