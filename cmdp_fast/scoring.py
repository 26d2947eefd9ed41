"""Completions as both models read them, and the statistics of their tokens: from hidden states, by the tile, or from
logits.

Either way a model gives one tensor per token, its *outputs*, which a trainer keeps, hands to the operations and
differentiates without knowing which it is. `score` is the loop over a batch; it keeps the teacher's outputs for the
update where they fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmdp_fast import batches
from cmdp_fast.constraint import Constraint
from cmdp_fast.errors import InputError
from cmdp_fast.heads import Head, head_of, whole_head
from cmdp_fast.ops.constrained import constrained_reward
from cmdp_fast.ops.divergence import divergence
from cmdp_fast.ops.linear import linear_token_stats
from cmdp_fast.ops.linear_constrained import linear_constrained_reward
from cmdp_fast.ops.linear_divergence import linear_divergence
from cmdp_fast.ops.token_stats import token_stats
from cmdp_fast.reading import TokenBatch, completion_hidden, completion_logits
from cmdp_fast.reference import BudgetTrace, ConstrainedReward, TokenStats
from cmdp_fast.teachers.teacher import Teacher, TeacherOutputs
from cmdp_fast.topk_scoring import FromTopK, Models, Outputs


@dataclass
class _AtTemperatures:
    """The policy's temperature, by which the operations divide the logits of both models, and the teacher's own."""

    vocab_size: int  # columns that count
    temperature: float
    teacher_temperature: float = 0.0  # 0: the policy's
    padding_free: bool = False  # completions are read one after another in a row (`packed.py`)

    @property
    def teacher_factor(self) -> float:
        """By what the teacher's logits are multiplied, so that ``temperature`` makes them those of its own."""
        return self.temperature / self.teacher_temperature if self.teacher_temperature else 1.0


@dataclass
class FromLogits(_AtTemperatures):
    """Outputs are logits ``[B, T, V]``."""

    def outputs(self, model: Any, completions: TokenBatch) -> Tensor:
        """Those of one model."""
        if isinstance(model, Teacher):
            return self.of_answer(model.of_completions(completions))
        return completion_logits(model, completions, self.padding_free)

    def of_answer(self, answer: TeacherOutputs) -> Tensor:
        """Those that a teacher has answered with."""
        return answer.as_logits()

    def constrained_reward(
        self,
        models: Models,
        outputs: Outputs,
        tokens: Tensor,
        task_reward: Tensor,
        *,
        mask: Tensor,
        constraint: Constraint,
    ) -> ConstrainedReward:
        """`cf.constrained_reward` of tokens, task rewards and mask [B, T]."""
        return constrained_reward(
            *self._at_temperatures(models, outputs),
            tokens,
            task_reward,
            constraint=constraint,
            mask=mask,
            temperature=self.temperature,
            vocab_size=self.vocab_size,
        )

    def token_stats(
        self, models: Models, outputs: Outputs, tokens: Tensor, mask: Tensor, *, inplace: bool = True
    ) -> TokenStats:
        """`cf.token_stats` of tokens [B, T]; ``inplace``: nobody reads the logits again, and the gradient, which is as
        large as they are, takes their place."""
        return token_stats(
            *self._at_temperatures(models, outputs),
            tokens,
            mask=mask,
            inplace_backward=inplace,
            temperature=self.temperature,
            vocab_size=self.vocab_size,
        )

    def divergence(self, models: Models, outputs: Outputs, mask: Tensor, beta: float) -> Tensor:
        """`cf.divergence` of kind ``jsd``, [B, T] in nats: forward KL for ``beta`` 0, reverse KL for 1."""
        return divergence(
            *self._at_temperatures(models, outputs),
            "jsd",
            beta=beta,
            mask=mask,
            temperature=self.temperature,
            vocab_size=self.vocab_size,
        )

    def _at_temperatures(self, models: Models, outputs: Outputs) -> Outputs:
        """Logits of which ``temperature`` makes those of each model's own; the teacher as the policy has its own too.
        In float32 or better: half precision would round them once more."""
        if self.teacher_factor == 1.0:
            return outputs
        policy, teacher = outputs
        wide = torch.promote_types(teacher.dtype, torch.float32)
        scaled = teacher.to(wide) * self.teacher_factor
        return (policy.to(wide) * self.teacher_factor if models[0] is models[1] else policy), scaled


@dataclass
class FromHiddenStates(_AtTemperatures):
    """Outputs are hidden states ``[B, T, H]``; logits exist a tile at a time (`cf.linear_token_stats`).

    The head runs in the dtype of the hidden states, whatever autocast says where the statistics are computed: a loss
    may be inside it and the scoring outside, and both must have the same numbers.
    """

    def outputs(self, model: Any, completions: TokenBatch) -> Tensor:
        """Those of one model."""
        if isinstance(model, Teacher):
            return self.of_answer(model.of_completions(completions))
        return completion_hidden(model, completions, self.padding_free)

    def of_answer(self, answer: TeacherOutputs) -> Tensor:
        """Those that a teacher has answered with."""
        return answer.as_hidden()

    def constrained_reward(
        self,
        models: Models,
        outputs: Outputs,
        tokens: Tensor,
        task_reward: Tensor,
        *,
        mask: Tensor,
        constraint: Constraint,
    ) -> ConstrainedReward:
        """`cf.linear_constrained_reward` of tokens, task rewards and mask [B, T]."""
        with without_autocast(outputs[0]):
            return linear_constrained_reward(
                *(*self._halves(models, outputs), tokens, task_reward),
                constraint=constraint,
                mask=mask,
                temperature=self.temperature,
                vocab_size=self.vocab_size,
            )

    def token_stats(
        self, models: Models, outputs: Outputs, tokens: Tensor, mask: Tensor, *, inplace: bool = True
    ) -> TokenStats:
        """`cf.linear_token_stats` of tokens [B, T]; there are no logits whose place a gradient could take."""
        with without_autocast(outputs[0]):
            return linear_token_stats(
                *(*self._halves(models, outputs), tokens),
                mask=mask,
                temperature=self.temperature,
                vocab_size=self.vocab_size,
            )

    def divergence(self, models: Models, outputs: Outputs, mask: Tensor, beta: float) -> Tensor:
        """`cf.linear_divergence` of kind ``jsd``, [B, T] in nats: forward KL for ``beta`` 0, reverse KL for 1."""
        student, head, teacher, teacher_head = self._halves(models, outputs)
        if 0 < beta < 1:  # a mixture takes whole heads
            head, teacher_head = whole_head(head), whole_head(teacher_head)
        with without_autocast(student):
            return linear_divergence(
                *(student, head, teacher, teacher_head, "jsd"),
                beta=beta,
                mask=mask,
                temperature=self.temperature,
                vocab_size=self.vocab_size,
            )

    def _halves(self, models: Models, outputs: Outputs) -> tuple[Tensor, Head, Tensor, Head]:
        """Hidden states and head of the policy, and of the teacher, of whose logits ``temperature`` makes those of its
        own; the teacher as the policy has its own too."""
        policy, teacher = outputs
        head, teacher_head = head_for(models[0], policy), head_for(models[1], teacher)
        teacher_head = teacher_head.scaled(self.teacher_factor)
        if models[0] is models[1]:
            head = head.scaled(self.teacher_factor)
        return policy, head, teacher[..., : teacher_head.weight.shape[1]], teacher_head  # of several, as wide as all


Scoring = FromLogits | FromHiddenStates | FromTopK


def answering(model: Any, completions: TokenBatch) -> Any:
    """Of a `Teacher`, which may be several, the one that answers for some completions; any other model itself."""
    return model.of(completions) if isinstance(model, Teacher) else model


def head_for(model: Any, hidden: Tensor) -> Head:
    """A model's head for hidden states of theirs: float32 weights meet bfloat16 hidden states in bfloat16, as autocast
    would have it."""
    head = model.own_head() if isinstance(model, Teacher) else head_of(model)
    return head._replace(weight=head.weight.to(hidden.dtype))


def without_autocast(hidden: Tensor) -> torch.autocast:
    return torch.autocast(hidden.device.type, enabled=False)


def make_scoring(
    logits: str,
    models: tuple[Any, ...],
    vocab_size: int,
    temperature: float,
    teacher_temperature: float = 0.0,
    padding_free: bool = False,
) -> Scoring:
    """The scoring that the setting ``logits`` names, with the policy's temperature and the teacher's (0: the same).
    Raises InputError for a model whose head is not known."""
    if len(models) > 1 and isinstance(models[1], Teacher) and models[1].about.answers == "topk":
        return FromTopK(logits, vocab_size, temperature, padding_free)
    if logits == "full":
        return FromLogits(vocab_size, temperature, teacher_temperature, padding_free)
    for name, model in zip(("student", "teacher"), models, strict=False):  # or a student alone
        try:
            [each.own_head() for each in model.each()] if isinstance(model, Teacher) else head_of(model)
        except (TypeError, ValueError) as error:
            raise InputError(f"{name}: {error}; with --logits full it can be used all the same") from error
    return FromHiddenStates(vocab_size, temperature, teacher_temperature, padding_free)


# --------------------------------------------------------------------------------------------------------------
# The loop over a batch


class ScoredBatch(NamedTuple):
    """Completions against their budget, tensors ``[B, T]``; the teacher's outputs ``[B, T, ...]`` if they were kept."""

    stats: TokenStats
    trace: BudgetTrace
    reward: Tensor  # modified
    teacher_outputs: Tensor | None


def score(
    count: int,
    settle: Callable[[slice], tuple[ConstrainedReward, Tensor]],
    *,
    at_once: int,
    cache_bytes: int = 0,
) -> ScoredBatch:
    """The account of ``count`` completions, scored ``at_once`` at a time.

    ``settle`` is given rows, reads them with both models, and returns their statistics, trace and modified reward, and
    the teacher's outputs. These are kept if those of all rows take at most ``cache_bytes``.
    """
    settled: list[ConstrainedReward] = []
    kept: Tensor | None = None
    for start in range(0, count, at_once):
        part = slice(start, min(start + at_once, count))
        one, teacher = settle(part)
        settled.append(one)
        if teacher[0].nbytes * count <= cache_bytes:
            kept = teacher.new_empty(count, *teacher.shape[1:]) if kept is None else kept
            kept[part] = teacher
    return ScoredBatch(*batches.joined(settled), kept)
