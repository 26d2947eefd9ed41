"""A method: the source of the completions, the weights of their tokens, and the loss. `step.py` is the step around
it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

import cmdp_fast as cf
from cmdp_fast.constraint import Constraint
from cmdp_fast.scoring import answering

from ..experience import Collector, Experience, Metrics
from ..records.clock import Clock
from ..rollout import Rollout
from ..stored import check_stored, chosen, stored_by
from ..tasks.data import Problem
from . import METHODS

Targets = dict[str, Tensor]  # [B, T] each


class Loss(NamedTuple):
    """The loss of some completions, a scalar, with its metrics, and the student's outputs that it comes from."""

    loss: Tensor
    metrics: dict[str, Tensor]
    outputs: Tensor  # [B, T, ...]: hidden states or logits


class Method(ABC):
    """A way to learn from a teacher; the defaults are those of a method on the student's own text.

    A step calls `collect`, `targets` once, `loss` for each part of each minibatch, and `explained` at its end.
    """

    mean_over: ClassVar[Literal["completions", "tokens"]] = "tokens"
    """A loss is the mean over these."""

    def __init__(self, collector: Collector, clock: Clock, value_head: nn.Module | None = None) -> None:
        """``collector`` samples and scores, ``clock`` books the time; ``value_head`` where one predicts the returns."""
        self.collector, self.clock, self.value_head = collector, clock, value_head
        self.config, self.accelerator = collector.config, collector.accelerator
        assert collector.teacher is not None  # which an evaluation alone may lack
        self.student, self.teacher, self.scoring = collector.student, collector.teacher, collector.scoring

    def check(self, prompts: list[list[int]]) -> None:
        """Raises InputError, before a run, for prompts that it cannot learn from."""
        if (stored := stored_by(self.teacher)) is not None:
            check_stored(stored, prompts, self.config, self.collector.sampling)

    def collect(self, problems: list[Problem], prompts: list[list[int]], constraint: Constraint) -> Experience:
        """A completion of each prompt, sampled and scored."""
        return self.collector.collect(
            *(self.student, problems, prompts, constraint, self.clock),
            group_size=self.config.num_generations,
            keep_outputs=True,
            value_head=self.value_head,
        )

    def targets(self, experience: Experience, constraint: Constraint) -> Targets:
        """The numbers that the loss needs of each token, [B, T] each, from all completions of the step."""
        return {}

    @abstractmethod
    def loss(self, part: Experience, target: Targets, constraint: Constraint, over: float) -> Loss:
        """The loss of some completions of a minibatch: a sum divided by ``over``, which counts those in all of it."""

    def explained(self, experience: Experience, targets: Targets) -> Metrics:
        """Figures of all processes' completions after the updates of a step."""
        return {}

    def stored(self, prompts: list[list[int]]) -> list[list[int]] | None:
        """The completions that the teacher has stored for the prompts of a step, None where it stores none."""
        if (stored := stored_by(self.teacher)) is None:
            return None
        return chosen(stored, prompts, self.config.num_generations, self.collector.passes)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to keep of it; plain numbers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`."""
        del state

    # ------------------------------------------------------------------------------------- for the losses

    def statistics(
        self, part: Experience, constraint: Constraint
    ) -> tuple[cf.TokenStats, tuple[Tensor, Tensor], Tensor | None]:
        """(statistics of the student as it is now, both models' outputs, the cost where it passes a gradient)."""
        models, outputs = (self.student, answering(self.teacher, part.rollout)), self.outputs(part)
        tokens, mask = part.rollout.tokens, part.rollout.mask
        with self.clock.phase("kernels"):
            if constraint.cost == "jsd":
                cost = self.scoring.divergence(models, outputs, mask, constraint.beta)
                return self.scoring.token_stats(models, outputs, tokens, mask, inplace=False), outputs, cost
            stats = self.scoring.token_stats(models, outputs, tokens, mask)
        return stats, outputs, None if constraint.action_dependent else cf.token_cost(stats, constraint.cost)

    def outputs(self, part: Experience) -> tuple[Tensor, Tensor]:
        """Student's and teacher's hidden states or logits; the teacher's are those of the scoring as far as they were
        kept."""
        return self.collector.outputs(self.student, part.rollout), self._teacher_outputs(part)

    @torch.no_grad()
    def _teacher_outputs(self, part: Experience) -> Tensor:
        def compute(rollout: Rollout) -> Tensor:
            return self.collector.outputs(self.teacher, rollout)

        kept = part.teacher_outputs
        return compute(part.rollout) if kept is None else kept.completed(part.rollout, compute)


def method_named(name: str) -> type[Method]:
    """The class of a method in the table `METHODS`."""
    module, _, class_name = METHODS[name].implementation.partition(":")
    method: type[Method] = getattr(import_module(f"{__package__}.{module}"), class_name)
    return method
