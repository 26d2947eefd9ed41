"""Generalised knowledge distillation (Agarwal et al., ICLR 2024), on-policy: no reward and no budget.

The loss is a divergence between student and teacher at the tokens of the student's own completions, a mean over tokens;
the sampling is not differentiated.
"""

from __future__ import annotations

from torch import Tensor

from cmdp_fast.constraint import Constraint

from ..experience import Experience
from .ppo import PPO, Targets


class GKD(PPO):
    """PPO's step with the loss replaced by JSD(beta): 0 is forward KL, 1 reverse KL."""

    mean_over = "tokens"

    def targets(self, experience: Experience, constraint: Constraint) -> Targets:
        return {}

    def loss(self, part: Experience, target: Targets, over: float) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        outputs = self.outputs(part)
        with self.clock.phase("kernels"):
            value = self.scoring.divergence(
                (self.student, self.teacher), outputs, part.rollout.mask, self.config.jsd_beta
            )
        return value.sum() / over, {}, outputs[0]
