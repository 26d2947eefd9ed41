"""MiniLLM (Gu et al., ICLR 2024): reverse KL of whole sequences by policy gradient, without a task reward.

The gradient of KL(p_student‖p_teacher) over sequences splits in two (their equation 3), with
r_t = log p_teacher(a_t|s_t) - log p_student(a_t|s_t):

single step   the gradient of the reverse KL at each state, which is known exactly
long term     grad log p_student(a_t|s_t) times the rewards that follow, normalised by how many there are (equation 7)

Completions are sampled from a mixture, teacher_mix of the teacher and the rest of the student at each token; both parts
are weighted by the ratio of the student's probability to the mixture's at that token (equations 5, 6), in the long-term
part clipped as PPO does. From the long-term part the mean of the group's other completions at the same position is
subtracted, which changes no expectation for teacher_mix = 0. Their language-modelling loss on a pre-training corpus is
left out: there is no such corpus here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cmdp_fast import objective
from cmdp_fast.constraint import Constraint

from ..causal_lm import CausalLM
from ..experience import Experience
from ..tasks.data import Problem
from .method import Loss, Method, Targets


class MiniLLM(Method):
    """Samples from a mixture, length-normalised returns in PPO's clipped loss, and the exact single-step part."""

    def collect(self, problems: list[Problem], prompts: list[list[int]], constraint: Constraint) -> Experience:
        mix = self.config.teacher_mix
        return self.collector.collect(
            self.student,
            problems,
            prompts,
            constraint,
            self.clock,
            mixed_with=self._mixture if mix else None,
            group_size=self.config.num_generations,
            keep_outputs=True,
        )

    def _mixture(self, prompt_mask: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        c = self.config
        teacher = self.accelerator.unwrap_model(self.teacher)
        temperatures = (c.temperature, c.teacher_temperature or c.temperature)
        return TeacherMixture(teacher, prompt_mask, c.teacher_mix, temperatures)

    def targets(self, experience: Experience, constraint: Constraint) -> Targets:
        stats, mask, mix = experience.stats, experience.rollout.mask, self.config.teacher_mix
        behaviour = stats.logprob
        if mix:
            behaviour = torch.logaddexp(math.log(mix) + stats.teacher_logprob, math.log1p(-mix) + stats.logprob)
        reward = torch.where(mask, stats.teacher_logprob - stats.logprob, 0.0)
        long_term = objective.position_rloo(mean_of_later(reward, mask), self.config.num_generations, mask)
        weight = torch.where(mask, (stats.logprob - behaviour).exp(), 0.0)
        return {"advantage": long_term, "direct": weight, "behaviour": behaviour}

    def loss(self, part: Experience, target: Targets, constraint: Constraint, over: float) -> Loss:
        stats, outputs, _ = self.statistics(part, constraint)
        loss, metrics = objective.ppo_loss(
            stats.logprob,
            target["behaviour"],
            target["advantage"],
            mask=part.rollout.mask,
            clip_low=self.config.clip_low,
            clip_high=self.config.clip_high,
            cost=stats.reverse_kl,
            direct=target["direct"],
            normalizer=over,
        )
        return Loss(loss, metrics, outputs[0])


def mean_of_later(reward: Tensor, mask: Tensor) -> Tensor:
    """The mean of the rewards after each token [B, T]; 0 for the last, and where masked."""
    reward = torch.where(mask, reward, 0.0)
    later = reward.flip(1).cumsum(1).flip(1) - reward
    count = mask.long().flip(1).cumsum(1).flip(1) - mask.long()
    return torch.where(mask, later / count.clamp(min=1), 0.0)


class TeacherMixture:
    """A logits processor that turns the student's logits into the logarithm of mix * teacher + (1 - mix) * student.

    ``temperatures`` are those of the student and of the teacher. It runs the teacher beside the student, with a cache
    of its own, so it serves one call of `generate`.
    """

    def __init__(self, teacher: CausalLM, prompt_mask: Tensor, mix: float, temperatures: tuple[float, float]) -> None:
        self.teacher, self.mix, self.temperatures = teacher, mix, temperatures
        self.attention = prompt_mask.long()
        self.cache: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.cache is not None:
            self.attention = torch.cat([self.attention, self.attention.new_ones(len(input_ids), 1)], dim=1)
            input_ids = input_ids[:, -1:]
        positions = (self.attention.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        output = self.teacher(
            input_ids=input_ids,
            attention_mask=self.attention,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = output.past_key_values
        # Models of a family may pad their vocabulary differently.
        width = min(scores.shape[-1], output.logits.shape[-1])
        student, teacher = (
            torch.log_softmax(logits[:, :width].float() / temperature, -1)
            for logits, temperature in zip((scores, output.logits[:, -1]), self.temperatures, strict=True)
        )
        mixed = torch.full_like(scores, -torch.inf, dtype=torch.float32)
        mixed[:, :width] = torch.logaddexp(math.log(self.mix) + teacher, math.log1p(-self.mix) + student)
        return mixed
