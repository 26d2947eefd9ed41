"""PPO with k3 in the loss: the task's reward alone by policy gradient, and beside it a penalty that is differentiated.

    k3 = exp(-rho) - 1 + rho,  rho = log p_student(a|s) - log p_teacher(a|s)

It is the KL penalty of GRPO, and that of TRL's GRPOTrainer (`beta`) and of verl's actor (`use_kl_loss` with
`kl_loss_type=low_var_kl`) with the teacher for their reference model. k3 is never negative and its mean is the reverse
KL, but the sampling is not differentiated: its gradient, (1 - exp(-rho)) grad log p_student, has the mean of that of
*forward* KL at each state. With `kl_loss_correction` k3 is multiplied by PPO's ratio, whose gradient adds what is
missing to that of reverse KL at each state (DeepSeek-V3.2): TRL 1.16 does so by default, verl's low_var_kl does not.

The penalty is a sum over a completion's tokens, as the score term is: TRL's `loss_type="dr_grpo"`, without its division
by the longest length. It is not divided by a group's deviation, though the advantages of `--baseline grpo` are, and
PPO's clip has no part in it.

k3 is not bounded, as in TRL; `cost_clamp` bounds it as verl does with 10, and beyond it k3 has no gradient. The
bound takes from the mean the tokens that the student neglects most, so it is not the default; an exponential that
overflows (a log-ratio above 88 in float32) ends the training as any other gradient that is not finite.

Source: Schulman 2020, "Approximating KL divergence"; Shao et al. 2024 (DeepSeekMath, equation 4); DeepSeek-V3.2 (arXiv
2512.02556), as TRL cites it.
"""

from __future__ import annotations

import torch
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast.constraint import Constraint

from ..experience import Experience
from .method import Targets
from .ppo import PPO


class KLLoss(PPO):
    """PPO whose constraint has no price, and whose direct term is ``coefficient`` times k3."""

    def targets(self, experience: Experience, constraint: Constraint) -> Targets:
        """Those of PPO; ``direct`` is the coefficient, whatever the advantages are divided by."""
        mask = experience.rollout.mask
        return super().targets(experience, constraint) | {"direct": self.config.coefficient * mask.float()}

    def statistics(
        self, part: Experience, constraint: Constraint
    ) -> tuple[cf.TokenStats, tuple[Tensor, Tensor], Tensor]:
        """As of any method, with k3 for the cost."""
        stats, outputs, _ = super().statistics(part, constraint)
        penalty = k3(stats.logprob, stats.teacher_logprob, constraint.cost_clamp)
        if self.config.kl_loss_correction:
            penalty = penalty * (stats.logprob - part.stats.logprob).exp()
        return stats, outputs, penalty


def k3(logprob: Tensor, teacher_logprob: Tensor, clamp: float | None = None) -> Tensor:
    """exp(-rho) - 1 + rho of each token in nats, differentiable in ``logprob``; at most ``clamp``, and infinite without
    one where the student excludes the token, without a gradient there. (`cmdp_fast.token_cost` has the value of it,
    detached.)"""
    log_ratio = teacher_logprob.detach() - logprob
    over = torch.isposinf(log_ratio.detach())  # of a token that the student excludes: inf - inf is NaN
    if clamp is not None:
        over = over | (torch.expm1(log_ratio.detach()) - log_ratio.detach() > clamp)
    # An infinite exponential times the gradient 0 of a clamp would be NaN.
    inside = torch.where(over, 0.0, log_ratio)
    return torch.where(over, torch.inf if clamp is None else clamp, torch.expm1(inside) - inside)
