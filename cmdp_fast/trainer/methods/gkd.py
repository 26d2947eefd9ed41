"""Generalised knowledge distillation (Agarwal et al., ICLR 2024), on-policy: no reward and no budget.

The loss is a divergence between student and teacher at the tokens of the student's own completions, a mean over tokens;
the sampling is not differentiated. With a teacher on disk the completions are those that it has stored, and none is the
student's own: the paper's supervised part, alone.
"""

from __future__ import annotations

import torch

from cmdp_fast.constraint import Constraint
from cmdp_fast.scoring import answering

from ..experience import Experience
from ..tasks.data import Problem
from .method import Loss, Method, Targets


class GKD(Method):
    """JSD(beta) on the student's own text: 0 is forward KL, 1 reverse KL."""

    def collect(self, problems: list[Problem], prompts: list[list[int]], constraint: Constraint) -> Experience:
        return self.collector.collect(
            *(self.student, problems, prompts, constraint, self.clock),
            given=self.stored(prompts),
            group_size=self.config.num_generations,
            keep_outputs=True,
        )

    def targets(self, experience: Experience, constraint: Constraint) -> Targets:
        """``direct``, the weight of a token's divergence: 1, until completions of another sampler are weighed."""
        return {"direct": experience.rollout.mask.float()}

    def loss(self, part: Experience, target: Targets, constraint: Constraint, over: float) -> Loss:
        models, outputs = (self.student, answering(self.teacher, part.rollout)), self.outputs(part)
        with self.clock.phase("kernels"):
            value = self.scoring.divergence(models, outputs, part.rollout.mask, self.config.jsd_beta)
        weighed = torch.where(target["direct"] != 0, target["direct"] * value, 0.0)  # 0 * inf: no part of the loss
        return Loss(weighed.sum() / over, {}, outputs[0])
