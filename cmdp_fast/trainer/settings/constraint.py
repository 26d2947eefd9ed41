"""What a completion may spend and what it pays for more: the arguments that a run gives `cf.constrained_reward`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cmdp_fast import objective
from cmdp_fast.ops.budget import BudgetTrace
from cmdp_fast.reference import DIFFERENTIABLE_COSTS

if TYPE_CHECKING:  # the integrations use a constraint where the command line's packages may be missing
    from .config import TrainConfig


@dataclass(frozen=True)
class Constraint:
    """A cost, its budget and a modified reward; see `cf.constrained_reward` for each field."""

    cost: str
    budget: float
    per_token: bool
    reduction: str
    kind: str
    penalty: float
    discrepancy_weight: float
    coefficient: float | None
    beta: float

    @property
    def options(self) -> dict[str, Any]:
        """All of it as keyword arguments."""
        return asdict(self)

    @property
    def action_dependent(self) -> bool:
        """Whether the cost of a token depends on the token sampled, so that there is no direct gradient."""
        return self.cost not in DIFFERENTIABLE_COSTS

    def direct(self, trace: BudgetTrace, mask: Tensor) -> Tensor:
        """The weights [B, T] of the direct term, `objective.direct_coefficient`."""
        return objective.direct_coefficient(
            trace,
            self.kind,
            discrepancy_weight=self.discrepancy_weight,
            coefficient=self.coefficient,
            reduction=self.reduction,
            mask=mask,
        )


def training_constraint(config: TrainConfig, step: int, coefficient: float | None) -> Constraint:
    """What holds in a step, counted from 0; `coefficient` is lambda or kappa of the moment."""
    worst_case = config.kind == "worst_case"
    return Constraint(
        cost=config.cost,
        budget=config.prefix_budget if worst_case else budget_at(config, step),
        per_token=config.budget_per_token and not worst_case,
        reduction="mean" if worst_case else "sum",
        kind=config.kind,
        penalty=config.penalty,
        discrepancy_weight=config.discrepancy_weight,
        coefficient=coefficient,
        beta=config.jsd_beta,
    )


def evaluation_constraint(config: TrainConfig) -> Constraint:
    """What every method is measured by: the cost's sum against the final budget.

    `worst_case` bounds something else, so its sum is that of reverse KL, as for a method that says nothing of a cost.
    """
    return Constraint(
        cost="reverse_kl" if config.kind == "worst_case" else config.cost,
        budget=config.budget,
        per_token=config.budget_per_token,
        reduction="sum",
        kind="hinge",
        penalty=config.penalty,
        discrepancy_weight=config.discrepancy_weight,
        coefficient=None,
        beta=config.jsd_beta,
    )


def budget_at(config: TrainConfig, step: int) -> float:
    """The budget of a step, counted from 0: from `budget_start` to `budget` in a straight line, then constant."""
    if step >= config.budget_steps:
        return config.budget
    share = step / config.budget_steps
    return config.budget_start + share * (config.budget - config.budget_start)
