"""Distillation on the teacher's text: no reward, no budget, and nothing of the student's own making.

sft   sequence-level distillation (Kim and Rush, EMNLP 2016): the negative log-likelihood of the teacher's completions
kd    word-level distillation: forward KL at each token of the teacher's completions

Both are means over tokens. The completions are sampled from the teacher as the student's would be; the metrics of a
step are of those completions, so its accuracy is the teacher's. Evaluations sample from the student.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmdp_fast.constraint import Constraint

from ..experience import Experience
from ..tasks.data import Problem
from .ppo import PPO, Targets


class OffPolicy(PPO):
    """PPO's step on the teacher's completions, with a supervised loss."""

    mean_over = "tokens"

    def collect(self, rows: list[Problem], prompts: list[list[int]], constraint: Constraint) -> Experience:
        return self.collector.collect(
            self.student, rows, prompts, constraint, self.clock, sampler=self.teacher, keep_outputs=True
        )

    def targets(self, experience: Experience, constraint: Constraint) -> Targets:
        return {}

    def loss(self, part: Experience, target: Targets, over: float) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        stats, outputs, _ = self.statistics(part, self.constraint())
        value = -stats.logprob if self.config.algorithm == "sft" else stats.forward_kl
        return torch.where(part.rollout.mask, value, 0.0).sum() / over, {}, outputs[0]
