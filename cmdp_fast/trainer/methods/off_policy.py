"""Distillation on the teacher's text: no reward, no budget, and nothing of the student's own making.

sft   sequence-level distillation (Kim and Rush, EMNLP 2016): the negative log-likelihood of the teacher's completions
kd    word-level distillation: forward KL at each token of the teacher's completions

Both are means over tokens. The completions are sampled from the teacher as the student's would be, or are those that a
teacher on disk has stored (`stored.py`). The metrics of a step are of those completions, so its accuracy is the
teacher's. Evaluations sample from the student. A completion ends with the teacher's own end, which the student learns
and from then on ends with (`stops.py`).
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast.constraint import Constraint

from ..experience import Experience
from ..tasks.data import Problem
from .method import Loss, Method, Targets


class OffPolicy(Method):
    """A supervised loss on the teacher's completions."""

    def collect(self, problems: list[Problem], prompts: list[list[int]], constraint: Constraint) -> Experience:
        given = self.stored(prompts)
        return self.collector.collect(
            *(self.student, problems, prompts, constraint, self.clock),
            sampler=self.teacher if given is None else None,
            given=given,
            group_size=self.config.num_generations,
            keep_outputs=True,
        )

    def loss(self, part: Experience, target: Targets, constraint: Constraint, over: float) -> Loss:
        stats, outputs, _ = self.statistics(part, constraint)
        return Loss(torch.where(part.rollout.mask, self.of_token(stats), 0.0).sum() / over, {}, outputs[0])

    @abstractmethod
    def of_token(self, stats: cf.TokenStats) -> Tensor:
        """The loss of each token [B, T]."""


class SequenceLevel(OffPolicy):
    """`sft`: the negative log-likelihood."""

    def of_token(self, stats: cf.TokenStats) -> Tensor:
        return -stats.logprob


class WordLevel(OffPolicy):
    """`kd`: forward KL."""

    def of_token(self, stats: cf.TokenStats) -> Tensor:
        return stats.forward_kl
