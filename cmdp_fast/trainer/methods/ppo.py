"""Constrained PPO: the modified reward by policy gradient, and the gradient through the divergence beside it.

advantage  the worth of each token, compared with the group's other completions or with a value head's prediction
loss       PPO's clipped term with the advantages, and the direct term: the cost of each token with its coefficient
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast import batches, credit, objective
from cmdp_fast.constraint import Constraint

from ..experience import Experience, Metrics
from ..micro_batches import lengths_of, split
from ..models.value_head import explained_variance
from ..reward_range import RewardRange
from ..rollout import Rollout
from ..tasks.data import Problem
from .method import Loss, Method, Targets


class PPO(Method):
    """The method for a budget, and its soft relaxations: see the settings ``kind`` and ``baseline``."""

    mean_over = "completions"  # the objective is a sum over a completion's tokens and a mean over completions

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.reward_range = RewardRange()

    def collect(self, problems: list[Problem], prompts: list[list[int]], constraint: Constraint) -> Experience:
        """A completion of each prompt, sampled and scored, `in_unit`."""
        return self.in_unit(super().collect(problems, prompts, constraint), constraint)

    def in_unit(self, experience: Experience, constraint: Constraint) -> Experience:
        """With the task's reward at its token in the unit of the setting ``reward_unit``, where that is its range as a
        share of it, and the modified reward that follows. Every process must call this."""
        if not self.config.in_range:
            return experience
        mask, scored = experience.rollout.mask, experience.scored
        self.reward_range.see(experience.task_reward[scored], self.accelerator)
        share, known = (
            each.unflatten(0, (-1, self.config.num_generations))
            for each in (self.reward_range.share(experience.task_reward), scored)
        )
        # Not the share of the mean: it is compared with this sum to the last bit.
        share = torch.where(known, share, credit.mean_of_scored(share, known)).flatten()
        task = credit.at_last_token(share, mask)
        reward = cf.modified_reward(
            task, experience.cost(constraint), experience.trace, constraint=constraint, mask=mask
        )
        return replace(experience, last_reward=task, reward=reward)

    def state_dict(self) -> dict[str, Any]:
        return {"reward_range": self.reward_range.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reward_range.load_state_dict(state["reward_range"])

    def targets(self, experience: Experience, constraint: Constraint) -> Targets:
        """``advantage``, the weight of a token in the score term; ``direct``, the weight of its cost in the direct
        term, divided by the divisor of the advantages; with a value head, ``value``, its target."""
        c, mask = self.config, experience.rollout.mask
        direct = objective.direct_coefficient(experience.trace, constraint, mask=mask)
        scored = None if experience.scored.all() else experience.scored
        if c.baseline == "gae":
            assert experience.value is not None
            beyond = self.beyond(experience) if c.bootstrap_truncated else None
            advantage, value = objective.gae(
                experience.reward, experience.value, mask=mask, gamma=c.gamma, lam=c.gae_lambda, beyond=beyond
            )
            if scored is not None:
                advantage = torch.where(scored[:, None], advantage, self._by_constraint(experience, constraint))
            return {"advantage": advantage, "direct": direct, "value": value}
        if c.baseline == "position_rloo":
            score = credit.score(
                experience.reward, experience.last_reward, experience.trace, constraint, mask=mask, gamma=c.gamma
            )
            unconstrained = objective.returns_to_go(experience.last_reward, mask=mask, gamma=c.gamma)
            advantage = credit.position_advantage(score, unconstrained, c.num_generations, mask, scored)
            return {"advantage": advantage, "direct": direct}
        returns = objective.returns_to_go(experience.reward, mask=mask, gamma=c.gamma)[:, 0]
        if scored is not None and c.gamma < 1:
            returns = self._without_length(returns, experience, constraint)
        advantage, scale = credit.sequence_advantage(returns, c.num_generations, c.baseline, scored=scored)
        return {"advantage": torch.where(mask, advantage[:, None], 0.0), "direct": direct / scale[:, None]}

    @torch.no_grad()
    def beyond(self, experience: Experience) -> Tensor:
        """What the value head predicts after the last token of each completion that was cut off, [B]; 0 for others."""
        c, rollout = self.config, experience.rollout
        values = torch.zeros(len(rollout), device=rollout.tokens.device)
        # Without wrappers: processes differ in how many were cut off, and DDP's would wait for one another.
        student, value_head = (self.accelerator.unwrap_model(model) for model in (self.student, self.value_head))
        with self.clock.phase("scoring"):
            cut = (~rollout.finished).nonzero()[:, 0].tolist()
            bounds = {"count": c.micro_batch_size, "tokens": c.micro_batch_tokens}
            for part in split(cut, lengths_of(rollout), **bounds, packed=c.padding_free):
                longer, place = one_token_more(part.of_rollout(rollout))
                value = value_head(self.collector.outputs(student, longer))
                values[part.index(values.device)] = value.gather(1, place[:, None])[:, 0]
        return values

    def _by_constraint(self, experience: Experience, constraint: Constraint) -> Tensor:
        """The worth [B, T] of each token by what the constraint makes of the task's reward alone.

        It is all that there is to learn from a completion that is not scored. A value head knows it only together with
        the task's reward, so the group's other completions are the baseline.
        """
        mask, gamma = experience.rollout.mask, self.config.gamma
        score = credit.score(
            experience.reward, experience.last_reward, experience.trace, constraint, mask=mask, gamma=gamma
        )
        score = score - objective.returns_to_go(experience.last_reward, mask=mask, gamma=gamma)
        groups = [row // self.config.num_generations for row in range(len(mask))]
        return credit.less_others(score, groups, mask)

    def _without_length(self, returns: Tensor, experience: Experience, constraint: Constraint) -> Tensor:
        """The returns [B], with the task's part in those of completions that are not scored made the mean of their
        group's: the mean of its rewards, discounted over another length, would be worth something."""
        mask, group = experience.rollout.mask, self.config.num_generations

        def discounted(reward: Tensor) -> Tensor:
            return objective.returns_to_go(reward, mask=mask, gamma=self.config.gamma)[:, 0]

        task, scored = (x.unflatten(0, (-1, group)) for x in (discounted(experience.last_reward), experience.scored))
        mean = credit.mean_of_scored(task, scored)
        own = discounted(objective.task_part(experience.last_reward, experience.trace, constraint, mask=mask))
        end = credit.last_token(mask).float()
        kept = objective.task_part(end, experience.trace, constraint, mask=mask).sum(
            1
        )  # 1, or 0 where the constraint takes it
        neutral = returns - own + kept * mean.expand_as(task).flatten()
        return torch.where(experience.scored, returns, neutral)

    def loss(self, part: Experience, target: Targets, constraint: Constraint, over: float) -> Loss:
        c, mask = self.config, part.rollout.mask
        stats, outputs, cost = self.statistics(part, constraint)
        loss, metrics = objective.ppo_loss(
            stats.logprob,
            part.stats.logprob,
            target["advantage"],
            mask=mask,
            clip_low=c.clip_low,
            clip_high=c.clip_high,
            cost=cost,
            direct=None if cost is None else target["direct"],
            normalizer=over,
        )
        if self.value_head is not None:
            known = mask & part.scored[:, None]
            error = torch.where(known, self.value_head(outputs[0]) - target["value"], 0.0)
            metrics["loss/value"] = error.square().sum() / over
            loss = loss + metrics["loss/value"]
        return Loss(loss, {name: value.detach() for name, value in metrics.items()}, outputs[0])

    def explained(self, experience: Experience, targets: Targets) -> Metrics:
        """The ends of the task reward's range so far, where that is its unit; with a value head, how much of the
        returns' variance it predicts."""
        ends = {f"cmdp/reward_{end}": value for end, value in self.reward_range.state_dict().items()}
        if experience.value is None:
            return ends
        tensors = (experience.value, targets["value"], experience.rollout.mask & experience.scored[:, None])
        value, target, mask = (batches.gathered(tensor, self.accelerator) for tensor in tensors)
        return ends | {"value/explained_variance": float(explained_variance(value, target, mask))}


def one_token_more(rollout: Rollout) -> tuple[Rollout, Tensor]:
    """Completions with a token of no meaning after their last one, at the place [B]: the outputs there are those that
    would predict it."""
    place = torch.arange(1, rollout.mask.shape[1] + 1, device=rollout.mask.device).mul(rollout.mask).amax(1)
    tokens, mask = (torch.cat([each, torch.zeros_like(each[:, :1])], 1) for each in (rollout.tokens, rollout.mask))
    mask[torch.arange(len(place), device=place.device), place] = True
    return replace(rollout, tokens=tokens, mask=mask, sampler_logprob=None, lengths=None), place
