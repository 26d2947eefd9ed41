"""Experience: completions, what the rewards say of them, and what student and teacher make of their tokens.

`Collector` samples and scores; training steps and evaluations both look through it. `measure` turns experience into
the metrics that are logged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast import objective

from .config import TrainConfig
from .constraint import Constraint
from .data import Row
from .report import Clock
from .rewards import RewardFunction, call_rewards
from .rollout import Rollout, RolloutFunction, Sampling, call_rollout, generate
from .scoring import make_scoring

Metrics = dict[str, float]


@dataclass
class Completions:
    """B completions and their task rewards."""

    rollout: Rollout
    texts: list[str]
    task_reward: Tensor  # [B], all reward functions together
    named_rewards: dict[str, Tensor]  # [B] each, NaN where the function has no opinion


@dataclass
class Experience(Completions):
    """The same, scored: tensors [B, T] each."""

    stats: cf.TokenStats  # of the policy that is trained or evaluated
    trace: cf.BudgetTrace
    reward: Tensor  # modified
    last_reward: Tensor  # the task reward at its token
    cost: Tensor | None = None  # where it is not one of the statistics (jsd)
    value: Tensor | None = None  # what a value head predicts
    teacher_outputs: Tensor | None = None  # [B, T, ...], if they are kept

    def rows(self, index: Tensor) -> Experience:
        """Some of the completions, without their texts."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value[index] for name, value in values.items() if isinstance(value, Tensor)}
        return replace(
            self,
            **tensors,
            rollout=self.rollout.rows(index),
            texts=[],
            named_rewards={},
            stats=cf.TokenStats(*(column[index] for column in self.stats)),
            trace=cf.BudgetTrace(*(column[index] for column in self.trace)),
        )


class Collector:
    """Samples completions from a policy and scores them against a teacher (None: there is none, only rewards)."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        accelerator: Any,
        student: Any,
        teacher: Any,
        tokenizer: Any,
        sampling: Sampling,
        vocab_size: int,
        rewards: dict[str, RewardFunction],
        rollout: RolloutFunction | None = None,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.student = student
        self.teacher = teacher
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.rewards = rewards
        self.rollout = rollout
        models = (student,) if teacher is None else (student, teacher)
        self.scoring = make_scoring(config.logits, models, vocab_size, config.temperature)

    # ------------------------------------------------------------------------------------- sample

    def complete(
        self,
        policy: Any,
        rows: list[Row],
        prompts: list[list[int]],
        clock: Clock,
        mixed_with: Callable[[Tensor], Any] | None = None,
    ) -> Completions:
        """Completions of the prompts by a policy, with their rewards. The user's `rollout` samples for the student."""
        with clock.phase("rollout"), torch.no_grad(), self.accelerator.autocast():
            model = self.accelerator.unwrap_model(policy)
            if self.rollout is not None and policy is self.student and mixed_with is None:
                rollout = call_rollout(self.rollout, self.config.rollout, prompts, self.sampling, model)
            else:
                synced = self.accelerator.num_processes > 1
                rollout = generate(model, prompts, self.sampling, mixed_with=mixed_with, synced_gpus=synced)
            ids = rollout.completion_ids()
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        with clock.phase("scoring"):
            values = call_rewards(self.rewards, rows, texts, ids)
            named = {name: torch.tensor(v, device=rollout.tokens.device) for name, v in values.items()}
            return Completions(rollout, texts, torch.stack(list(named.values())).nansum(0), named)

    def collect(
        self,
        policy: Any,
        rows: list[Row],
        prompts: list[list[int]],
        constraint: Constraint,
        clock: Clock,
        *,
        sampler: Any = None,
        mixed_with: Callable[[Tensor], Any] | None = None,
        **scoring: Any,
    ) -> Experience:
        """Completions by `sampler` (None: the policy itself) as policy and teacher see them; see `score`."""
        completions = self.complete(policy if sampler is None else sampler, rows, prompts, clock, mixed_with)
        with clock.phase("scoring"):
            return self.score(completions, policy, constraint, clock, **scoring)

    # ------------------------------------------------------------------------------------- score

    @torch.no_grad()
    def score(
        self,
        completions: Completions,
        policy: Any,
        constraint: Constraint,
        clock: Clock,
        *,
        keep_outputs: bool = False,
        value_head: Any = None,
    ) -> Experience:
        """Statistics, account and modified reward of each token; the teacher's outputs too if they fit in the cache."""
        rollout = completions.rollout
        last_reward = at_last_token(completions.task_reward, rollout.mask)
        kept, parts, costs, values = None, [], [], []
        for rows in torch.arange(len(rollout)).split(self.config.micro_batch_size):
            part = rollout.rows(rows)
            models, outputs = (policy, self.teacher), (self.outputs(policy, part), self.outputs(self.teacher, part))
            with clock.phase("kernels"):
                parts.append(
                    self.scoring.constrained_reward(
                        models, outputs, part.tokens, last_reward[rows], mask=part.mask, **constraint.options
                    )
                )
                if constraint.cost == "jsd":
                    costs.append(self.scoring.divergence(models, outputs, part.mask, constraint.beta))
            if value_head is not None:
                values.append(torch.where(part.mask, value_head(outputs[0]), 0.0))
            teacher = outputs[1]
            size = len(rollout) * teacher[0].numel() * teacher.element_size()
            if keep_outputs and size <= self.config.teacher_cache_mb * 2**20:
                if kept is None:
                    kept = teacher.new_empty(len(rollout), *teacher.shape[1:])
                kept[rows] = teacher
        return Experience(
            **vars(completions),
            stats=cf.TokenStats(*(torch.cat(column) for column in zip(*(p.stats for p in parts), strict=True))),
            trace=cf.BudgetTrace(*(torch.cat(column) for column in zip(*(p.trace for p in parts), strict=True))),
            reward=torch.cat([p.reward for p in parts]),
            last_reward=last_reward,
            cost=torch.cat(costs) if costs else None,
            value=torch.cat(values) if values else None,
            teacher_outputs=kept,
        )

    def outputs(self, model: Any, rollout: Rollout) -> Tensor:
        """What a model makes of each token of the completions, [B, T, ...]: hidden states or logits."""
        with self.accelerator.autocast():
            return self.scoring.outputs(model, rollout)

    # ------------------------------------------------------------------------------------- measure

    def measure(self, experience: Experience, constraint: Constraint) -> Metrics:
        """Metrics of the completions of all processes: TRL's names where TRL has one, `cmdp/` before ours. In nats."""
        e = gathered(experience, self.accelerator)
        mask, finished = e.rollout.mask, e.rollout.finished
        length = mask.sum(1)
        tokens = length.sum()
        log_ratio = torch.where(mask, e.stats.logprob - e.stats.teacher_logprob, 0.0)
        metrics = {
            "reward": e.task_reward.mean(),
            "reward_std": e.task_reward.std(),
            "kl": e.stats.reverse_kl.sum() / tokens,
            "entropy": e.stats.entropy.sum() / tokens,
            "completions/mean_length": length.float().mean(),
            "completions/min_length": length.min(),
            "completions/max_length": length.max(),
            "completions/clipped_ratio": 1.0 - finished.float().mean(),
        }
        metrics |= {f"rewards/{name}/mean": value.nanmean() for name, value in e.named_rewards.items()}
        if e.rollout.sampler_logprob is not None:
            off = torch.where(mask, (e.stats.logprob - e.rollout.sampler_logprob).abs(), 0.0)
            metrics["sampling/sampling_logp_difference/mean"] = off.sum() / tokens
            metrics["sampling/sampling_logp_difference/max"] = off.max()
        ours = objective.constraint_metrics(
            cf.token_cost(e.stats, constraint.cost) if e.cost is None else e.cost,
            e.trace,
            mask=mask,
            correct=e.task_reward >= self.config.correct_at,
            mean_budget=constraint.budget if constraint.reduction == "mean" else None,
        )
        ours |= {
            "modified_reward": e.reward.sum(1).mean(),
            "budget": torch.tensor(constraint.budget),
            "cumulative_kl": e.stats.reverse_kl.sum(1).mean(),  # exact; beside it what the samples alone would say
            "cumulative_k1": log_ratio.sum(1).mean(),
            "cumulative_k3": (torch.expm1(-log_ratio) + log_ratio).sum(1).mean(),
        }
        if constraint.kind in ("lagrangian", "pid"):
            ours["lambda"] = torch.tensor(constraint.coefficient)
        return {name: float(value) for name, value in metrics.items()} | {
            f"cmdp/{name}": float(value) for name, value in ours.items()
        }


def at_last_token(value: Tensor, mask: Tensor) -> Tensor:
    """[B, T] with value [B] at the last token of each completion and 0 elsewhere."""
    out = torch.zeros(mask.shape, device=mask.device)
    return out.scatter_(1, mask.sum(1, keepdim=True) - 1, value.float()[:, None])


def gathered(experience: Experience, accelerator: Any) -> Experience:
    """The completions of all processes, the same on each; without texts, prompts and the teacher's outputs."""
    if accelerator.num_processes == 1:
        return experience

    def gather(value: Tensor) -> Tensor:
        whole = value.to(torch.int64) if value.dtype == torch.bool else value
        if whole.dim() > 1:
            whole = accelerator.pad_across_processes(whole, dim=1)
        return accelerator.gather(whole.contiguous()).to(value.dtype)

    def optional(value: Tensor | None) -> Tensor | None:
        return None if value is None else gather(value)

    e, rollout = experience, experience.rollout
    return Experience(
        rollout=Rollout(
            rollout.prompt_ids[:0],
            rollout.prompt_mask[:0],
            gather(rollout.tokens),
            gather(rollout.mask),
            gather(rollout.finished),
            optional(rollout.sampler_logprob),
        ),
        texts=[],
        task_reward=gather(e.task_reward),
        named_rewards={name: gather(value) for name, value in e.named_rewards.items()},
        stats=cf.TokenStats(*map(gather, e.stats)),
        trace=cf.BudgetTrace(*map(gather, e.trace)),
        reward=gather(e.reward),
        last_reward=gather(e.last_reward),
        cost=optional(e.cost),
        value=optional(e.value),
    )
