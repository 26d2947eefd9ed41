"""What a completion may spend and what it pays for more, as another trainer's configuration states it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import cmdp_fast as cf
from cmdp_fast.errors import InputError
from cmdp_fast.ops.terms import check_terms
from cmdp_fast.trainer.settings import constraint

SAMPLED_COSTS = ("k1", "k3", "nll")
"""Costs that the log-probabilities of the sampled token give, the student's and the teacher's."""

SETTINGS = ("budget", "cost", "kind", "penalty", "discrepancy_weight", "coefficient")


@dataclass(frozen=True, kw_only=True)
class Constraint(constraint.Constraint):
    """A cost, its budget in nats a completion, and a modified reward, of a user: checked, and with defaults.

    The `SETTINGS` are his; see `cf.modified_reward` for each. ``kind`` is any but ``pid``, whose multiplier has a state
    that these trainers would not checkpoint. ``worst_case`` accounts the prefix mean of ``nll``, every other kind the
    sum. Raises InputError for a value that is not allowed.
    """

    per_token: bool = field(default=False, init=False)
    reduction: str = field(default="", init=False)  # told by the kind
    beta: float = field(default=0.5, init=False)  # of JSD, which is no cost here
    kind: str = "cmdp"
    penalty: float = 1.0
    discrepancy_weight: float = 1.0
    coefficient: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.budget, bool) or not isinstance(self.budget, int | float) or not self.budget >= 0:
            raise InputError(f"budget={self.budget!r}, expected a number of nats that is not negative")
        if self.kind == "pid":
            raise InputError("kind='pid': its multiplier has a state that is not checkpointed here; use 'lagrangian'")
        try:
            check_terms(
                *(self.cost, self.kind, self.penalty, None, self.discrepancy_weight, self.coefficient),
                barrier_slope=10.0,
                gamma=1.0,
                reduction=None,
                edge="strict",
                costs=("reverse_kl", "forward_kl", *SAMPLED_COSTS),
            )
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error
        object.__setattr__(self, "reduction", "mean" if self.kind == "worst_case" else "sum")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any] | None, where: str) -> Constraint:
        """The constraint that a section ``where`` of a configuration states. Raises InputError for a key that is
        unknown or missing."""
        if not settings or not {"budget", "cost"} <= set(settings):
            raise InputError(f"{where} has {sorted(settings or {})}, expected at least 'budget' and 'cost'")
        if unknown := set(settings) - set(SETTINGS):
            raise InputError(f"{where} has {sorted(unknown)}, expected some of {', '.join(SETTINGS)}")
        return cls(**{str(name): value for name, value in settings.items()})

    def trace(self, cost: Tensor, mask: Tensor) -> cf.BudgetTrace:
        """What was spent: `cf.budget_trace` of costs [B, T]."""
        return cf.budget_trace(cost.detach(), self.budget, mask=mask, reduction=self.reduction)

    def reward(self, task_reward: Tensor, cost: Tensor, trace: cf.BudgetTrace, mask: Tensor) -> Tensor:
        """The modified reward [B, T]."""
        return cf.modified_reward(
            task_reward,
            cost.detach(),
            trace,
            kind=self.kind,
            penalty=self.penalty,
            discrepancy_weight=self.discrepancy_weight,
            coefficient=self.coefficient,
            mask=mask,
        )

    def direct(self, trace: cf.BudgetTrace, mask: Tensor) -> Tensor:
        """The weights [B, T] of the direct term; zeros for a cost without a gradient."""
        if self.action_dependent:
            return trace.remaining.new_zeros(trace.remaining.shape)
        return super().direct(trace, mask)
