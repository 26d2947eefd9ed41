"""Experience: completions, their rewards, and the statistics of their tokens under student and teacher.

`Collector` samples and scores; training steps and evaluations both look through it. `measure` turns experience into
the metrics that are logged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import cmdp_fast as cf
from cmdp_fast import batches, objective, scoring
from cmdp_fast.constraint import Constraint
from cmdp_fast.credit import at_last_token
from cmdp_fast.metrics import as_numbers, budget_metrics, divergences
from cmdp_fast.reward_functions import Logged
from cmdp_fast.split_rows import SplitRows

from .distributed import together
from .records.clock import Clock
from .rollout import Rollout, RolloutFunction, Sampling, call_rollout, generate
from .settings.config import TrainConfig
from .tasks.data import Problem
from .tasks.rewards import RewardFunction, call_rewards, trainer_state
from .tasks.step_verifiers import StepVerifier, call_step_verifier

if TYPE_CHECKING:
    from accelerate import Accelerator

Metrics = dict[str, float]


@dataclass
class Completions:
    """B completions, their task rewards, and the verdicts of a step verifier."""

    rollout: Rollout
    texts: list[str]
    task_reward: Tensor  # [B], all reward functions together
    named_rewards: dict[str, Tensor]  # [B] each, NaN where the function has no opinion
    failed: dict[str, Tensor]  # [B] each, 1 where a judge that is asked elsewhere said nothing: it raised, hung or died
    sound: Tensor | None  # [B], 1 where all steps are right, 0 where not, NaN where there is nothing to check
    logged: Logged = field(default=Logged({}, {}), kw_only=True)  # by the reward functions of this process


@dataclass
class Experience(Completions):
    """The same, scored: tensors [B, T] each."""

    stats: cf.TokenStats  # of the policy that is trained or evaluated
    trace: cf.BudgetTrace
    reward: Tensor  # modified
    last_reward: Tensor  # the task reward at its token
    value: Tensor | None = None  # a value head's prediction
    teacher_outputs: Tensor | SplitRows | None = None  # [B, T, ...], if they are kept

    def rows(self, index: Tensor) -> Experience:
        """Some of the completions, without their texts."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors: dict[str, Any] = {name: v[index] for name, v in values.items() if isinstance(v, (Tensor, SplitRows))}
        return replace(
            self,
            **tensors,
            rollout=self.rollout.rows(index),
            texts=[],
            named_rewards={},
            failed={},
            stats=cf.TokenStats(*(column[index] for column in self.stats)),
            trace=cf.BudgetTrace(*(column[index] for column in self.trace)),
        )


class Collector:
    """Samples completions from a policy and scores them against a teacher (None: there is none, only rewards)."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        accelerator: Accelerator,
        student: nn.Module,
        teacher: nn.Module | None,
        tokenizer: Any,
        sampling: Sampling,
        vocab_size: int,
        rewards: dict[str, RewardFunction],
        step_verifier: StepVerifier | None = None,
        rollout: RolloutFunction | None = None,
        problem_count: int = 0,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.student = student
        self.teacher = teacher
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.rewards = rewards
        self.step_verifier = step_verifier
        self.rollout = rollout
        self.problem_count = problem_count  # to train on, of which an epoch is made
        self.steps_done = 0  # which reward functions are told
        models = (student,) if teacher is None else (student, teacher)
        self.scoring = scoring.make_scoring(config.logits, models, vocab_size, config.temperature)

    # ------------------------------------------------------------------------------------- sample

    def complete(
        self,
        policy: nn.Module,
        rows: list[Problem],
        prompts: list[list[int]],
        clock: Clock,
        mixed_with: Callable[[Tensor], Any] | None = None,
    ) -> Completions:
        """Completions of the prompts by a policy, with their rewards. The user's `rollout` samples for the student."""
        with clock.phase("rollout"), torch.no_grad(), self.accelerator.autocast():
            model = self.accelerator.unwrap_model(policy)
            if self.rollout is not None and policy is self.student and mixed_with is None:
                with together(self.accelerator):
                    rollout = call_rollout(self.rollout, self.config.rollout, prompts, self.sampling, model)
            else:
                synced = self.accelerator.distributed_type == "FSDP"
                rollout = generate(model, prompts, self.sampling, mixed_with=mixed_with, synced_gpus=synced)
            ids = rollout.completion_ids()
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        with clock.phase("scoring"), together(self.accelerator):
            state = trainer_state(self.config, self.steps_done, self.problem_count, self.accelerator)
            judged = call_rewards(self.rewards, rows, texts, ids, state)
            named, failed = (
                {name: torch.tensor(v, device=rollout.tokens.device) for name, v in values.items()}
                for values in (judged.rewards, judged.failed)
            )
            sound = None
            if self.step_verifier is not None:
                verdicts = call_step_verifier(self.step_verifier, rows, texts)
                sound = torch.tensor(verdicts, device=rollout.tokens.device)
            total = torch.stack(list(named.values())).nansum(0)
            return Completions(rollout, texts, total, named, failed, sound, logged=judged.logged)

    def collect(
        self,
        policy: nn.Module,
        rows: list[Problem],
        prompts: list[list[int]],
        constraint: Constraint,
        clock: Clock,
        *,
        sampler: nn.Module | None = None,
        mixed_with: Callable[[Tensor], Any] | None = None,
        **options: Any,
    ) -> Experience:
        """Completions by `sampler` (None: the policy itself) as policy and teacher see them; see `score`."""
        completions = self.complete(policy if sampler is None else sampler, rows, prompts, clock, mixed_with)
        with clock.phase("scoring"):
            return self.score(completions, policy, constraint, clock, **options)

    # ------------------------------------------------------------------------------------- score

    @torch.no_grad()
    def score(
        self,
        completions: Completions,
        policy: nn.Module,
        constraint: Constraint,
        clock: Clock,
        *,
        keep_outputs: bool = False,
        value_head: nn.Module | None = None,
    ) -> Experience:
        """Statistics, account and modified reward of each token; the teacher's outputs too if they fit in the cache."""
        rollout, teacher, values = completions.rollout, self.teacher, list[Tensor]()
        assert teacher is not None
        last_reward = at_last_token(completions.task_reward, rollout.mask)

        def settle(index: slice) -> tuple[cf.ConstrainedReward, Tensor]:
            part = rollout.rows(index)
            outputs = (self.outputs(policy, part), self.outputs(teacher, part))
            with clock.phase("kernels"):
                settled = self.scoring.constrained_reward(
                    *((policy, teacher), outputs, part.tokens, last_reward[index]),
                    mask=part.mask,
                    constraint=constraint,
                )
            if value_head is not None:
                values.append(torch.where(part.mask, value_head(outputs[0]), 0.0))
            return settled, outputs[1]

        cache_bytes = self.config.teacher_cache_mb * 2**20 if keep_outputs else 0
        account = scoring.score(
            *(len(rollout), settle),
            at_once=self.config.micro_batch_size,
            cache_bytes=cache_bytes,
            spills=keep_outputs and self.config.offload_teacher,
        )
        return Experience(
            **vars(completions),
            **account._asdict(),
            last_reward=last_reward,
            value=torch.cat(values) if values else None,
        )

    def outputs(self, model: nn.Module, rollout: Rollout) -> Tensor:
        """A model's outputs at each token of the completions, [B, T, ...]: hidden states or logits."""
        with self.accelerator.autocast():
            return self.scoring.outputs(model, rollout)

    # ------------------------------------------------------------------------------------- measure

    def measure(self, experience: Completions, constraint: Constraint, count: int | None = None) -> Metrics:
        """Metrics of the completions of all processes: TRL's names where TRL has one, `cmdp/` before ours. In nats.

        Those of the divergence are there for an `Experience` alone. `count`: only the first so many completions.
        """
        e = gathered(experience, self.accelerator, count)
        length = e.rollout.mask.sum(1).float()
        right = e.task_reward >= self.config.correct_at
        metrics = {
            "reward": e.task_reward.mean(),
            "reward_std": e.task_reward.std(),
            "completions/mean_length": length.mean(),
            "completions/min_length": length.min(),
            "completions/max_length": length.max(),
            "completions/clipped_ratio": 1.0 - e.rollout.finished.float().mean(),
            "cmdp/accuracy": right.float().mean(),
        }
        metrics |= {f"rewards/{name}/mean": value.nanmean() for name, value in e.named_rewards.items()}
        if e.failed:
            metrics |= {f"rewards/{name}/failed": value.mean() for name, value in e.failed.items()}
            metrics["cmdp/unjudged"] = torch.stack(list(e.failed.values())).amax(0).mean()
        if e.sound is not None:
            metrics["cmdp/reasoning_success"] = e.sound.nanmean()
            metrics["cmdp/reasoning_checked"] = 1.0 - e.sound.isnan().float().mean()
        if isinstance(e, Experience):
            metrics |= self._divergence(e, constraint, right)
        return as_numbers(metrics)

    def _divergence(self, e: Experience, constraint: Constraint, right: Tensor) -> dict[str, Tensor]:
        """Metrics of the statistics under student and teacher, and of the constraint."""
        mask = e.rollout.mask
        tokens = mask.sum()
        metrics = {"kl": e.stats.reverse_kl.sum() / tokens, "entropy": e.stats.entropy.sum() / tokens}
        if e.rollout.sampler_logprob is not None:
            off = torch.where(mask, (e.stats.logprob - e.rollout.sampler_logprob).abs(), 0.0)
            metrics["sampling/sampling_logp_difference/mean"] = off.sum() / tokens
            metrics["sampling/sampling_logp_difference/max"] = off.max()
        if constraint.cost == "jsd":  # no statistic, and the account has it: not another pass over the logits
            cost = e.trace.cumulative.diff(dim=1, prepend=torch.zeros_like(e.trace.cumulative[:, :1]))
        else:
            cost = cf.token_cost(e.stats, constraint.cost, clamp=constraint.cost_clamp)
        ours = budget_metrics(
            *(cost, e.trace, divergences(e.stats, mask)),
            mask=mask,
            budget=constraint.budget,
            modified=e.reward.sum(1),
            correct=right,
        )
        if self.config.prefix_budget:
            likelihood = cf.token_cost(e.stats, "nll")
            of_prefixes = objective.constraint_metrics(
                likelihood, e.trace, mask=mask, mean_budget=self.config.prefix_budget
            )
            ours["prefix_satisfaction"] = of_prefixes["prefix_satisfaction"]
        if constraint.is_a.coefficient == "lambda":
            ours["lambda"] = torch.tensor(constraint.coefficient)
        return metrics | {f"cmdp/{name}": value for name, value in ours.items()}


def gathered(experience: Completions, accelerator: Accelerator, count: int | None = None) -> Completions:
    """The completions of all processes, the same on each; without texts, prompts and the teacher's outputs.

    `count`: only the first so many. Every process must have the same number of completions.
    """
    if accelerator.num_processes == 1:
        return experience
    return _united([experience], lambda values: batches.gathered(values[0], accelerator)[:count])


def joined(parts: Sequence[Completions]) -> Completions:
    """Several batches as one, padded to the longest completion; without texts, prompts and the teacher's outputs."""
    return _united(parts, batches.joined)


def _united(parts: Sequence[Completions], unite: Callable[[Sequence[Tensor]], Tensor]) -> Completions:
    """One experience from several: ``unite`` is called for each tensor [B] or [B, T] with those of all parts."""

    def fields_of(objects: Sequence[Any], names: Iterable[str]) -> dict[str, Any]:
        return {name: batches.united([getattr(o, name) for o in objects], unite) for name in names}

    rollouts = [part.rollout for part in parts]
    nothing = torch.zeros(0, 0, dtype=torch.long)
    rollout = Rollout(nothing, nothing.bool(), **fields_of(rollouts, ("tokens", "mask", "finished", "sampler_logprob")))
    # In the order of the fields: processes that gather one after the other must agree on it.
    names = [f.name for f in fields(parts[0]) if f.name not in ("rollout", "texts", "teacher_outputs", "logged")]
    return type(parts[0])(rollout=rollout, texts=[], **fields_of(parts, names))
