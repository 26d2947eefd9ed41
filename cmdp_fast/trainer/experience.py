"""Experience: completions, their rewards, and the statistics of their tokens under student and teacher.

`Collector` samples and scores; training steps and evaluations both look through it. `measure` turns experience into
the metrics that are logged.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import cmdp_fast as cf
from cmdp_fast import batches, objective, scoring
from cmdp_fast.constraint import Constraint
from cmdp_fast.credit import at_last_token, task_rewards
from cmdp_fast.metrics import as_numbers, budget_metrics, divergences
from cmdp_fast.reward_functions import Logged
from cmdp_fast.teachers.ahead import asked_ahead
from cmdp_fast.teachers.teacher import Teacher, UnderWay
from cmdp_fast.topk_scoring import FromTopK
from cmdp_fast.vocabulary import all_decoded

from .correction import check_reported, estimate_weight, log_ratio
from .distributed import any_process, by_itself, together
from .diversity import distinct, repetition
from .engine.engine import Engine
from .kept_outputs import KeptOutputs
from .micro_batches import MicroBatch, Splitter, in_order, lengths_of, widened
from .records.clock import Clock
from .rollout import Rollout, Sampling, assemble, generate
from .routing import held_to, metrics_by_teacher, teacher_index
from .settings.config import TrainConfig
from .stops import cut_text
from .tasks.data import Problem
from .tasks.rewards import RewardFunction, call_rewards, limit_of, trainer_state
from .tasks.step_verifiers import StepVerifier, call_step_verifier
from .user_rollout import RolloutFunction, call_rollout

if TYPE_CHECKING:
    from accelerate import Accelerator

Metrics = dict[str, float]

_log = logging.getLogger(__name__)


@dataclass
class Completions:
    """B completions, their task rewards, and the verdicts of a step verifier."""

    rollout: Rollout
    texts: list[str]
    task_reward: Tensor  # [B], all reward functions together; of one that is not scored the mean of its group
    scored: Tensor  # [B] bool: whether any reward function that counts has an opinion
    correct: Tensor  # [B] bool, by the one reward function that says so
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
    teacher_outputs: KeptOutputs | None = None
    upper_cost: Tensor | None = None  # where a teacher gives bounds alone; `stats` and `trace` have the lower

    @property
    def sampler_log_ratio(self) -> Tensor | None:
        """`correction.log_ratio` [B, T] of the policy."""
        return log_ratio(self.stats.logprob, self.rollout)

    def cost(self, constraint: Constraint) -> Tensor:
        """The constraint's cost of each token, [B, T] in nats."""
        if constraint.cost == "jsd":  # no statistic, and the account has it: not another pass over the logits
            return self.trace.cumulative.diff(dim=1, prepend=torch.zeros_like(self.trace.cumulative[:, :1]))
        return cf.token_cost(self.stats, constraint.cost, clamp=constraint.cost_clamp)

    def verdict(self, constraint: Constraint) -> cf.BudgetVerdict | None:
        """What a teacher's bounds prove of each completion's budget; None where its costs are exact."""
        if self.upper_cost is None:
            return None
        return cf.budget_verdict(self.cost(constraint), self.upper_cost, constraint=constraint, mask=self.rollout.mask)

    def rows(self, part: MicroBatch) -> Experience:
        """Some of the completions, as wide as their longest, without their texts."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors: dict[str, Any] = {name: part.of(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(
            self,
            **tensors,
            rollout=part.of_rollout(self.rollout),
            texts=[],
            named_rewards={},
            failed={},
            stats=cf.TokenStats(*map(part.of, self.stats)),
            trace=cf.BudgetTrace(*map(part.of, self.trace)),
            teacher_outputs=self.teacher_outputs and self.teacher_outputs.rows(part),
        )


class Collector:
    """Samples completions from a policy and scores them against a teacher (None: there is none, only rewards)."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        accelerator: Accelerator,
        student: nn.Module,
        teacher: nn.Module | Teacher | None,
        tokenizer: Any,
        sampling: Sampling,
        vocab_size: int,
        rewards: dict[str, RewardFunction],
        step_verifier: StepVerifier | None = None,
        rollout: RolloutFunction | None = None,
        engine: Engine | None = None,
        teacher_engine: Engine | None = None,
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
        self.engine, self.teacher_engine = engine, teacher_engine
        self.upcoming: list[list[int]] | None = None  # the prompts of the next step, to be begun with this one's
        self.problem_count = problem_count  # to train on, of which an epoch is made
        self.steps_done = 0  # which reward functions are told
        self.weights = torch.tensor(config.reward_weights or (1.0,) * len(rewards))
        self.judging = config.accuracy_reward or next(iter(rewards))  # which says whether a completion is right
        self._told: set[str] = set()  # what it was said of once: reward functions without an opinion, a rollout
        self.splitter = Splitter(config, accelerator)
        models = (student,) if teacher is None else (student, teacher)
        with accelerator.autocast():  # without it float32 copies do not meet the bfloat16 weights around them
            self.scoring = scoring.make_scoring(
                *(config.logits, models, vocab_size, config.temperature, config.teacher_temperature),
                padding_free=config.padding_free,
            )

    @property
    def passes(self) -> int:
        """How often all problems have been gone through."""
        size = self.config.prompts_per_step * self.accelerator.num_processes
        return self.steps_done * size // max(1, self.problem_count)

    # ------------------------------------------------------------------------------------- sample

    def complete(
        self,
        policy: nn.Module,
        rows: list[Problem],
        prompts: list[list[int]],
        clock: Clock,
        mixed_with: Callable[[Tensor], Any] | None = None,
        group_size: int = 1,
        given: list[list[int]] | None = None,
    ) -> Completions:
        """Completions of the prompts by a policy, with their rewards. The user's `rollout` samples for the student,
        an engine for the model that it serves. ``given``: completions that are there already, as token ids.

        ``group_size`` neighbours are compared with one another; rows that are not in such groups with none.
        """
        with clock.phase("rollout"), torch.no_grad(), self.accelerator.autocast():
            model = self.accelerator.unwrap_model(policy)
            engine = self.engine if policy is self.student else self.teacher_engine
            if given is not None:
                rollout = assemble(prompts, given, self.sampling, self.accelerator.device)
            elif engine is not None and mixed_with is None:
                upcoming, self.upcoming = self.upcoming, None
                rollout = engine.sample(policy, prompts, self._sampling_of(policy), self.steps_done, upcoming)
                if policy is not self.student:
                    rollout.sampler_logprob = None  # what it says is of the teacher
            elif self.rollout is not None and policy is self.student and mixed_with is None:
                with together(self.accelerator):
                    rollout = call_rollout(self.rollout, self.config.rollout, prompts, self.sampling, model)
                    check_reported(rollout, self.config)
                if any_process(rollout.sampler_logprob is None, self.accelerator):  # all of them gather it, or none
                    rollout.sampler_logprob = None
                    self._tell_of_no_correction()
            else:
                synced = self.accelerator.distributed_type == "FSDP"
                rollout = generate(model, prompts, self._sampling_of(policy), mixed_with=mixed_with, synced_gpus=synced)
            rollout.teacher_index = teacher_index(self.config, self.teacher, rows, rollout.tokens.device)
            ids = rollout.completion_ids()
        with clock.phase("scoring"), together(self.accelerator):
            texts = [cut_text(text, self.config.stop_strings) for text in all_decoded(self.tokenizer, ids)]
            state = trainer_state(self.config, self.steps_done, self.problem_count, self.accelerator)
            limit = limit_of(self.config)
            judged = call_rewards(self.rewards, rows, texts, ids, state, limit)
            named, failed = (
                {name: torch.tensor(v, device=rollout.tokens.device) for name, v in values.items()}
                for values in (judged.rewards, judged.failed)
            )
            sound = None
            if self.step_verifier is not None:
                verdicts = call_step_verifier(self.step_verifier, rows, texts, limit)
                sound = torch.tensor(verdicts, device=rollout.tokens.device)
            size = 1 if len(rows) % group_size else group_size
            penalty = self.config.missing_eos_penalty * ~rollout.finished
            total, scored = task_rewards(torch.stack(list(named.values()), 1), self.weights, size, deducted=penalty)
            correct = named[self.judging] >= self.config.correct_at  # not where it has no opinion
            return Completions(rollout, texts, total, scored, correct, named, failed, sound, logged=judged.logged)

    def _sampling_of(self, policy: nn.Module) -> Sampling:
        """The teacher is sampled at its own temperature where it has one: at that it is compared with."""
        own = self.config.teacher_temperature if policy is self.teacher else 0.0
        return replace(self.sampling, temperature=own) if own else self.sampling

    def collect(
        self,
        policy: nn.Module,
        rows: list[Problem],
        prompts: list[list[int]],
        constraint: Constraint,
        clock: Clock,
        *,
        sampler: Any = None,
        mixed_with: Callable[[Tensor], Any] | None = None,
        group_size: int = 1,
        given: list[list[int]] | None = None,
        **options: Any,
    ) -> Experience:
        """Completions by `sampler` (None: the policy itself), or those that are ``given``, as policy and teacher see
        them; see `score`."""
        completions = self.complete(
            policy if sampler is None else sampler, rows, prompts, clock, mixed_with, group_size, given
        )
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
        """Statistics, account and modified reward of each token; the teacher's outputs too, as far as there is room."""
        rollout, teacher = completions.rollout, self.teacher
        assert teacher is not None
        last_reward = at_last_token(completions.task_reward, rollout.mask)

        lengths, width = lengths_of(rollout), rollout.tokens.shape[1]
        parts = self.splitter(range(len(rollout)), lengths, rollout.teacher_index)
        settled: list[tuple[cf.ConstrainedReward, Tensor | None, Tensor | None]] = []
        kept: KeptOutputs | None = None
        for part, of_teacher in zip(parts, self._teacher_outputs(parts, rollout), strict=True):
            some = part.of_rollout(rollout)
            outputs = (self.outputs(policy, some), of_teacher())
            with clock.phase("kernels"):
                score = self.scoring.certified if isinstance(self.scoring, FromTopK) else self._exact
                account, upper = score(
                    *((policy, scoring.answering(teacher, some)), outputs, some.tokens, part.of(last_reward)),
                    mask=some.mask,
                    constraint=held_to(self.config, constraint, some.teacher_index),
                )
            value = None if value_head is None else torch.where(some.mask, value_head(outputs[0]), 0.0)
            value, upper = (None if each is None else batches.widened(each, width) for each in (value, upper))
            settled.append((widened(account, width), value, upper))
            if keep_outputs and part is parts[0]:
                kept = self._room_for(parts, outputs[1])
            if kept is not None:
                kept.keep(outputs[1], part)
        account, value, upper = in_order(parts, settled)
        return Experience(
            **vars(completions),
            **account._asdict(),
            last_reward=last_reward,
            value=value,
            teacher_outputs=kept,
            upper_cost=upper,
        )

    def _exact(self, *given: Any, **settings: Any) -> tuple[cf.ConstrainedReward, None]:
        """`constrained_reward` of a cost that needs no bounds."""
        return self.scoring.constrained_reward(*given, **settings), None

    def _teacher_outputs(self, parts: list[MicroBatch], rollout: Rollout) -> Iterator[Callable[[], Tensor]]:
        """What gives the teacher's outputs for each part, when it is called. A teacher that is asked gets the questions
        of the next parts meanwhile."""
        each = (part.of_rollout(rollout) for part in parts)
        if not isinstance(self.teacher, Teacher):
            return (partial(self.outputs, self.teacher, some) for some in each)
        return (partial(self._answered, question) for question in asked_ahead(self.teacher, each))

    def _answered(self, question: UnderWay) -> Tensor:
        with by_itself(self.accelerator):
            return self.scoring.of_answer(question.result())

    def _room_for(self, parts: list[MicroBatch], like: Tensor) -> KeptOutputs | None:
        """Where the teacher's outputs are kept, as far as the settings have room; None: nowhere."""
        c = self.config
        kept = KeptOutputs.with_room(
            *(parts, like, c.teacher_cache_mb * 2**20),
            on_host=c.teacher_cache_cpu,
            spills=c.teacher_device == "offload",
        )
        # A teacher that is spread over all processes is asked by all of them, or by none
        spread = self.accelerator.distributed_type == "FSDP"
        return None if spread and any_process(kept is None or bool(kept.missing), self.accelerator) else kept

    def outputs(self, model: Any, rollout: Rollout) -> Tensor:
        """A model's outputs at each token of the completions, [B, T, ...]: hidden states or logits."""
        with self.accelerator.autocast(), by_itself(self.accelerator):
            return self.scoring.outputs(model, rollout)

    # ------------------------------------------------------------------------------------- measure

    def measure(
        self, experience: Completions, constraint: Constraint, count: int | None = None, corrected: bool = False
    ) -> Metrics:
        """Metrics of the completions of all processes: TRL's names where TRL has one, `cmdp/` before ours. In nats.

        Those of the divergence are there for an `Experience` alone. `count`: only the first so many completions.
        ``corrected``: the account of the budget and the accuracy are estimates for the policy, by the weights of what
        another sampler has drawn for it; all else is of the completions as they are.
        """
        e = gathered(experience, self.accelerator, count)
        length = e.rollout.mask.sum(1).float()
        reward = e.task_reward[e.scored]
        metrics = {
            "reward": reward.mean(),
            "reward_std": reward.std() if len(reward) > 1 else reward.new_tensor(math.nan),
            "completions/mean_length": length.mean(),
            "completions/min_length": length.min(),
            "completions/max_length": length.max(),
            "completions/clipped_ratio": 1.0 - e.rollout.finished.float().mean(),
            "completions/distinct_2": distinct(e.rollout.tokens, e.rollout.mask, 2),
            "completions/repetition_4": repetition(e.rollout.tokens, e.rollout.mask, 4),
            "cmdp/accuracy": e.correct.float().mean(),
        }
        metrics |= {f"rewards/{name}/mean": value.nanmean() for name, value in e.named_rewards.items()}
        self._tell_of_silence(e.named_rewards)
        metrics |= {f"rewards/{name}/failed": value.mean() for name, value in e.failed.items()}
        unjudged = torch.stack([e.named_rewards[self.judging].isnan(), *(value > 0 for value in e.failed.values())])
        if e.failed or unjudged.any():
            metrics["cmdp/unjudged"] = unjudged.any(0).float().mean()
        if e.sound is not None:
            metrics["cmdp/reasoning_success"] = e.sound.nanmean()
            metrics["cmdp/reasoning_checked"] = 1.0 - e.sound.isnan().float().mean()
        if isinstance(e, Experience):
            metrics |= self._divergence(e, constraint, corrected)
        return as_numbers(metrics)

    def _tell_of_silence(self, named_rewards: dict[str, Tensor]) -> None:
        """Says it once of a reward function that has no opinion on any completion of a step, or of an evaluation."""
        silent = {name for name, value in named_rewards.items() if value.isnan().all()} - self._told
        for name in sorted(silent) if self.accelerator.is_main_process else ():
            _log.warning(
                "the reward %s has no opinion (None or NaN) on any of %d completions: it has no part in what is "
                "learned from them. This is said once",
                name,
                len(named_rewards[name]),
            )
        self._told |= silent

    def _tell_of_no_correction(self) -> None:
        """Says it once of a `rollout` that is to be corrected if it says how, and does not."""
        option = f"--rollout {self.config.rollout}"
        if self.config.has_sampler and self.config.correction and option not in self._told:
            self._told.add(option)
            if self.accelerator.is_main_process:
                _log.warning(
                    "%s returned completions without logprobs: they are taken for the student's, without a correction. "
                    "This is said once",
                    option,
                )

    def _divergence(self, e: Experience, constraint: Constraint, corrected: bool) -> dict[str, Tensor]:
        """Metrics of the statistics under student and teacher, and of the constraint."""
        mask = e.rollout.mask
        tokens = mask.sum()
        metrics = {"kl": e.stats.reverse_kl.sum() / tokens, "entropy": e.stats.entropy.sum() / tokens}
        surprise = -torch.where(mask, e.stats.teacher_logprob, 0.0).sum() / tokens
        ratio = e.sampler_log_ratio
        weight = estimate_weight(ratio, self.config) if corrected else None
        if ratio is not None:
            mode = self.config.correction if corrected else None
            metrics |= objective.sampler_metrics(ratio, mask=mask, mode=mode, clip=self.config.sampler_clip)
        account: dict[str, Any] = {
            "cost": e.cost(constraint),
            "trace": e.trace,
            "divergence": divergences(e.stats, mask),
            "mask": mask,
            "modified": e.reward.sum(1),
            "correct": e.correct,
            "weight": weight,
        }
        whose = e.rollout.teacher_index
        held = held_to(self.config, constraint, whose)
        budget = held.budget
        ours = budget_metrics(**account, budget=budget)
        if whose is not None:
            metrics |= metrics_by_teacher(self.config, whose, account, budget)
        if not isinstance(self.scoring, FromTopK):  # which knows the log-probability of no other token
            ours["teacher_perplexity"] = surprise.exp()
        if self.config.prefix_budget:
            likelihood = cf.token_cost(e.stats, "nll")
            of_prefixes = objective.constraint_metrics(
                likelihood, e.trace, mask=mask, mean_budget=self.config.prefix_budget, weight=weight
            )
            ours["prefix_satisfaction"] = of_prefixes["prefix_satisfaction"]
        if (verdict := e.verdict(held)) is not None:
            ours |= {name: flag.float().mean() for name, flag in verdict._asdict().items()}
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
    if any(each.sampler_logprob is None for each in rollouts):
        rollouts = [replace(each, sampler_logprob=None) for each in rollouts]
    nothing = torch.zeros(0, 0, dtype=torch.long)
    names_of_rollout = ("tokens", "mask", "finished", "sampler_logprob", "teacher_index")
    rollout = Rollout(nothing, nothing.bool(), **fields_of(rollouts, names_of_rollout))
    # In the order of the fields: processes that gather one after the other must agree on it.
    names = [f.name for f in fields(parts[0]) if f.name not in ("rollout", "texts", "teacher_outputs", "logged")]
    return type(parts[0])(rollout=rollout, texts=[], **fields_of(parts, names))
