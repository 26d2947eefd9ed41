"""From modified rewards to TRL's advantages: the group's baseline and scale, over the completions of all processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from cmdp_fast import batches
from cmdp_fast.credit import TaskRewards, position_advantage, sequence_advantage

if TYPE_CHECKING:
    from accelerate import Accelerator


def position_advantages(
    score: Tensor, task: TaskRewards, mask: Tensor, group_size: int, accelerator: Accelerator
) -> Tensor:
    """`objective.position_rloo` [B, T] of this process's completions; a group may be spread over processes.

    ``score`` [B, T] is that of `credit.score`; see `credit.position_advantage` for the completions that are not scored.
    An evaluation may have groups of one: 0, nothing to compare with.
    """
    if group_size == 1:
        return torch.zeros_like(score)
    everyones, everywhere = batches.gathered((score, mask), accelerator)
    compared = position_advantage(everyones, task.reward[:, None], group_size, everywhere, task.scored)
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

    ``scored`` [N] is that of `credit.task_rewards`, of the completions of all processes.
    """
    everyones = batches.gathered(returns, accelerator)
    advantage, scale = sequence_advantage(everyones, group_size, baseline, scale_rewards, scored=scored)
    mine = batches.of_this_process(len(mask), accelerator)
    return torch.where(mask, advantage[mine, None], 0.0), scale[mine, None]
