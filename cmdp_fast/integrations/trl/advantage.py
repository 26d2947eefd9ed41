"""From modified rewards to TRL's advantages: the group's baseline and scale, over the completions of all processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from cmdp_fast import batches, objective
from cmdp_fast.credit import sequence_advantage
from cmdp_fast.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator


class TaskRewards(NamedTuple):
    """Of the completions of all processes."""

    reward: Tensor  # [N], a number for each
    scored: Tensor  # [N] bool: whether it is the task's


def task_rewards(rewards: Tensor, weights: Tensor, group_size: int) -> TaskRewards:
    """One task reward per completion [N], from those of each function [N, F], where NaN means no opinion.

    A completion on which no function has an opinion is not scored. TRL leaves it out of the group's mean and deviation
    and gives it an advantage of 0. Here it is left out of them as well, and its own reward is the mean of its group's
    scored ones (0 without any): the task says nothing for or against it, and only the constraint acts.

    Raises InputError for an infinite reward, in all processes: nothing can be compared with it, and its group's
    advantages would be NaN. (TRL makes them 0, or 3e38 without a division.)
    """
    if rewards.isinf().any():
        raise InputError("a reward function returned an infinite reward (in float32); expected finite numbers or None")
    total = (rewards * weights.to(rewards.device)).nansum(1).unflatten(0, (-1, group_size))
    scored = ~rewards.isnan().all(1).unflatten(0, (-1, group_size))
    # As the baseline sums them up, to the last bit: the difference is multiplied by up to 1e4
    neutral = torch.where(scored, total, 0.0).sum(1, keepdim=True) / scored.sum(1, keepdim=True).clamp(min=1)
    return TaskRewards(torch.where(scored, total, neutral).flatten(), scored.flatten())


def position_advantages(
    score: Tensor, task: TaskRewards, mask: Tensor, group_size: int, accelerator: Accelerator
) -> Tensor:
    """`objective.position_rloo` [B, T] of this process's completions; a group may be spread over processes.

    ``score`` [B, T] is that of `credit.score`. The baseline falls where completions end, so a completion that is not
    scored would get an advantage from its length: it is compared by what the constraint has made of the task reward
    alone. An evaluation may have groups of one: 0, nothing to compare with.
    """
    if group_size == 1:
        return torch.zeros_like(score)
    everyones, everywhere = batches.gathered((score, mask), accelerator)
    compared, by_constraint = (
        objective.position_rloo(part, group_size, everywhere, scored=task.scored)
        for part in (everyones, everyones - task.reward[:, None])
    )
    compared = torch.where(task.scored[:, None], compared, by_constraint)
    return compared[batches.of_this_process(len(mask), accelerator), : mask.shape[1]]


def sequence_advantages(
    returns: Tensor,
    scored: Tensor,
    mask: Tensor,
    group_size: int,
    accelerator: Accelerator,
    baseline: Literal["grpo", "rloo"],
    scale_rewards: Literal["group", "batch", "none"] = "none",
) -> tuple[Tensor, Tensor]:
    """`credit.sequence_advantage` of this process's returns [B]: (advantage [B, T], scale [B, 1]).

    ``scored`` [N] is that of `task_rewards`, of the completions of all processes.
    """
    everyones = batches.gathered(returns, accelerator)
    advantage, scale = sequence_advantage(everyones, group_size, baseline, scale_rewards, scored=scored)
    mine = batches.of_this_process(len(mask), accelerator)
    return torch.where(mask, advantage[mine, None], 0.0), scale[mine, None]
