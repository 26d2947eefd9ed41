"""One step of constrained PPO, to be read from top to bottom.

roll out   the student samples a group of completions of each prompt
score      teacher and student read them; `constrained_reward` turns what both say into costs, the account of the
           budget and the modified reward, in one pass over the vocabulary, without holding logits (scoring.py)
advantage  what each token is worth, compared with the group's other completions
update     some epochs of clipped PPO over minibatches, with the direct term: the gradient through the divergence
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import cmdp_fast as cf
from cmdp_fast import objective

from .config import TrainConfig
from .data import Row
from .errors import InputError
from .report import Clock
from .rewards import RewardFunction, call_rewards
from .rollout import Rollout, Sampling, generate
from .scoring import make_scoring

Metrics = dict[str, float]


@dataclass
class Experience:
    """B scored completions of up to T tokens."""

    rollout: Rollout
    texts: list[str]
    task_reward: Tensor  # [B], all reward functions together
    named_rewards: dict[str, Tensor]  # [B] each, NaN where the function has no opinion
    stats: cf.TokenStats  # [B, T] each, of the policy that sampled
    trace: cf.BudgetTrace
    reward: Tensor  # [B, T], modified
    last_reward: Tensor  # [B, T], the task reward at its token
    teacher_outputs: Tensor | None  # [B, T, ...], if they are kept


class PPO:
    """A student, the teacher it must stay close to, and the means to improve the student by a step."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        accelerator: Any,
        student: Any,
        teacher: Any,
        tokenizer: Any,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        sampling: Sampling,
        vocab_size: int,
        rewards: dict[str, RewardFunction],
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.student = student
        self.teacher = teacher
        self.tokenizer = tokenizer
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.sampling = sampling
        self.scoring = make_scoring(config.logits, (student, teacher), vocab_size, config.temperature)
        self.rewards = rewards
        self.clock = Clock(accelerator.device)
        kp, ki, kd = config.pid_gains
        self.pid = objective.PIDController(kp=kp, ki=ki, kd=kd, initial_integral=config.coefficient)
        # lambda, which moves for pid only, or the barrier's kappa
        self.coefficient = config.coefficient if config.kind in ("lagrangian", "pid", "barrier") else None
        self.tokens_seen = 0

    def step(self, rows: list[Row], prompts: list[list[int]]) -> Metrics:
        """Improves the student on some problems; returns what is logged."""
        start = self.clock.now()
        group = self.config.num_generations
        rows = [row for row in rows for _ in range(group)]
        prompts = [ids for ids in prompts for _ in range(group)]
        experience = self.experience(self.student, rows, prompts, self.clock, keep_outputs=True)
        advantage, scale = self.advantage(experience)
        metrics = self.measure(experience)
        metrics |= self.update(experience, advantage, scale)
        if self.config.kind == "pid":
            self.coefficient = self.pid.update(metrics["cmdp/mean_cumulative"], self.config.budget)
        self.tokens_seen += int(experience.rollout.mask.sum())
        return metrics | {"num_tokens": self.tokens_seen, "step_time": self.clock.now() - start}

    # ------------------------------------------------------------------------------------- roll out and score

    def experience(
        self, policy: Any, rows: list[Row], prompts: list[list[int]], clock: Clock, *, keep_outputs: bool = False
    ) -> Experience:
        """Completions of the prompts by a policy (the student; the teacher, to evaluate it), with their scores."""
        with clock.phase("rollout"), self.accelerator.autocast():
            rollout = generate(policy, prompts, self.sampling)
            ids = rollout.completion_ids()
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        with clock.phase("scoring"):
            values = call_rewards(self.rewards, rows, texts, ids)
            named = {name: torch.tensor(v, device=rollout.tokens.device) for name, v in values.items()}
            task_reward = torch.stack(list(named.values())).nansum(0)
            last_reward = at_last_token(task_reward, rollout.mask)
            (stats, trace, reward), kept = self.score(policy, rollout, last_reward, clock, keep_outputs)
        return Experience(rollout, texts, task_reward, named, stats, trace, reward, last_reward, kept)

    @torch.no_grad()
    def score(
        self, policy: Any, rollout: Rollout, last_reward: Tensor, clock: Clock, keep_outputs: bool
    ) -> tuple[cf.ConstrainedReward, Tensor | None]:
        """Statistics, account and modified reward of each token; the teacher's outputs too if they fit in the cache."""
        c = self.config
        kept, parts = None, []
        for rows in torch.arange(len(rollout)).split(c.micro_batch_size):
            part = rollout.rows(rows)
            outputs = self.outputs(policy, part), self.outputs(self.teacher, part)
            with clock.phase("kernels"):
                parts.append(
                    self.scoring.constrained_reward(
                        (policy, self.teacher),
                        outputs,
                        part.tokens,
                        last_reward[rows],
                        c.budget,
                        mask=part.mask,
                        cost=c.cost,
                        kind=c.kind,
                        penalty=c.penalty,
                        discrepancy_weight=c.discrepancy_weight,
                        coefficient=self.coefficient,
                        reduction=c.reduction,
                    )
                )
            teacher = outputs[1]
            size = len(rollout) * teacher[0].numel() * teacher.element_size()
            if keep_outputs and size <= c.teacher_cache_mb * 2**20:
                if kept is None:
                    kept = teacher.new_empty(len(rollout), *teacher.shape[1:])
                kept[rows] = teacher
        stats = cf.TokenStats(*(torch.cat(column) for column in zip(*(p.stats for p in parts), strict=True)))
        trace = cf.BudgetTrace(*(torch.cat(column) for column in zip(*(p.trace for p in parts), strict=True)))
        return cf.ConstrainedReward(stats, trace, torch.cat([p.reward for p in parts])), kept

    def outputs(self, model: Any, rollout: Rollout) -> Tensor:
        """What a model makes of each token of the completions, [B, T, ...]: hidden states or logits."""
        with self.accelerator.autocast():
            return self.scoring.outputs(model, rollout)

    # ------------------------------------------------------------------------------------- advantage

    def advantage(self, experience: Experience) -> tuple[Tensor, Tensor]:
        """(advantage [B, T], scale [B]): what the score term weighs a token with, and what that was divided by."""
        c, mask = self.config, experience.rollout.mask
        if c.baseline == "position_rloo":
            task_part = objective.task_part(experience.last_reward, experience.trace, c.kind)
            score = objective.score_coefficient(
                experience.reward, task_part, action_dependent=c.action_dependent, mask=mask, gamma=c.gamma
            )
            return objective.position_rloo(score, c.num_generations, mask), torch.ones(len(mask), device=mask.device)
        returns = objective.returns_to_go(experience.reward, mask=mask, gamma=c.gamma)[:, 0]
        if c.baseline == "grpo":
            advantage, scale = objective.grpo(returns, c.num_generations)
        else:
            advantage, scale = objective.rloo(returns, c.num_generations), torch.ones_like(returns)
        return torch.where(mask, advantage[:, None], 0.0), scale

    # ------------------------------------------------------------------------------------- update

    def update(self, experience: Experience, advantage: Tensor, scale: Tensor) -> Metrics:
        """Some epochs over the completions in minibatches; returns the metrics' means over the minibatches."""
        c, rollout = self.config, experience.rollout
        direct = objective.direct_coefficient(
            experience.trace,
            c.kind,
            discrepancy_weight=c.discrepancy_weight,
            coefficient=self.coefficient,
            reduction=c.reduction,
            mask=rollout.mask,
        )
        direct = direct / scale[:, None]
        history: list[Metrics] = []
        with self.clock.phase("update"):
            for _ in range(c.epochs):
                for minibatch in torch.randperm(len(rollout)).split(c.minibatch_size):
                    metrics: Metrics = {}
                    for rows in minibatch.split(c.micro_batch_size):
                        loss, part, outputs = self.loss(experience, advantage, direct, rows, len(minibatch))
                        self.backward(loss, outputs)
                        share = int(rollout.mask[rows].sum()) / int(rollout.mask[minibatch].sum())
                        for name, value in part.items():  # losses add up, the others are means over tokens
                            weight = 1.0 if name.startswith("loss") else share
                            metrics[name] = metrics.get(name, 0.0) + weight * float(value)
                    norm = float(self.accelerator.clip_grad_norm_(self.student.parameters(), c.max_grad_norm))
                    if not math.isfinite(norm):
                        raise InputError(
                            "the gradient is not finite: the learning rate is too high, or the cost is infinite where "
                            "the teacher excludes a token that the student uses"
                        )
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    history.append(metrics | {"grad_norm": norm})
            learning_rate = self.scheduler.get_last_lr()[0]
            self.scheduler.step()
        return {name: sum(m[name] for m in history) / len(history) for name in history[0]} | {
            "learning_rate": learning_rate
        }

    def loss(
        self, experience: Experience, advantage: Tensor, direct: Tensor, rows: Tensor, sequences: int
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """(loss, metrics, the student's outputs) of some completions of a minibatch of so many sequences."""
        c, part = self.config, experience.rollout.rows(rows)
        if experience.teacher_outputs is not None:
            teacher = experience.teacher_outputs[rows]
        else:
            with torch.no_grad():
                teacher = self.outputs(self.teacher, part)
        student = self.outputs(self.student, part)
        with self.clock.phase("kernels"):
            stats = self.scoring.token_stats((self.student, self.teacher), (student, teacher), part.tokens, part.mask)
        loss, metrics = objective.ppo_loss(
            stats.logprob,
            experience.stats.logprob[rows],
            advantage[rows],
            mask=part.mask,
            clip_low=c.clip_low,
            clip_high=c.clip_high,
            cost=None if c.action_dependent else cf.token_cost(stats, c.cost),
            direct=None if c.action_dependent else direct[rows],
            normalizer=sequences,
        )
        return loss, metrics | {"loss": loss.detach()}, student

    def backward(self, loss: Tensor, outputs: Tensor) -> None:
        """The backward pass; its part above the outputs, loss and statistics, is booked as time in the kernels."""
        since = self.clock.now()
        outputs.register_hook(lambda _: self.clock.add("kernels", since))
        self.accelerator.backward(loss)

    # ------------------------------------------------------------------------------------- what is logged

    def measure(self, experience: Experience) -> Metrics:
        """Metrics of completions: TRL's names where TRL has one, `cmdp/` before ours. Divergences in nats."""
        c, e, mask = self.config, experience, experience.rollout.mask
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
            "completions/clipped_ratio": 1.0 - e.rollout.finished.float().mean(),
        }
        metrics |= {f"rewards/{name}/mean": value.nanmean() for name, value in e.named_rewards.items()}
        ours = objective.constraint_metrics(
            cf.token_cost(e.stats, c.cost),
            e.trace,
            mask=mask,
            correct=e.task_reward >= c.correct_at,
            mean_budget=c.budget if c.reduction == "mean" else None,
        )
        ours |= {
            "modified_reward": e.reward.sum(1).mean(),
            "cumulative_kl": e.stats.reverse_kl.sum(1).mean(),  # exact; beside it what the samples alone would say
            "cumulative_k1": log_ratio.sum(1).mean(),
            "cumulative_k3": (torch.expm1(-log_ratio) + log_ratio).sum(1).mean(),
        }
        if self.coefficient is not None and c.kind != "barrier":
            ours["lambda"] = torch.tensor(self.coefficient)
        return {name: float(value) for name, value in metrics.items()} | {
            f"cmdp/{name}": float(value) for name, value in ours.items()
        }


def at_last_token(value: Tensor, mask: Tensor) -> Tensor:
    """[B, T] with value [B] at the last token of each completion and 0 elsewhere."""
    out = torch.zeros(mask.shape, device=mask.device)
    return out.scatter_(1, mask.sum(1, keepdim=True) - 1, value.float()[:, None])
