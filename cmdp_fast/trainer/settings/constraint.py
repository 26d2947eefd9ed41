"""The constraint of a step and that of an evaluation, from a run's configuration."""

from __future__ import annotations

from cmdp_fast.constraint import KINDS, Constraint, of_a_scaled_direct_term

from .config import TrainConfig


def training_constraint(config: TrainConfig, step: int, multiplier: float = 0.0) -> Constraint:
    """The constraint of a step, counted from 0; ``multiplier`` is lambda of the moment, for `pid`."""
    worst_case = config.kind == "worst_case"
    return Constraint(
        cost=config.cost,
        budget=config.prefix_budget if worst_case else budget_at(config, step),
        per_token=config.budget_per_token and not worst_case,
        kind=config.kind,
        penalty=config.penalty,
        discrepancy_weight=config.discrepancy_weight,
        coefficient=multiplier if config.kind == "pid" else _price(config),
        beta=config.jsd_beta,
        cost_clamp=config.cost_clamp or None,
    )


def price_within(config: TrainConfig) -> float:
    """What a nat within the budget costs beside the budget, in units of the setting `reward_unit`; 0 where a method has
    no such price."""
    beside = config.entry.compares and KINDS[config.kind].coefficient == "price"
    return (_price(config) or 0.0) if beside else 0.0


def _price(config: TrainConfig) -> float | None:
    """Lambda or kappa of a kind in which it is constant; None for one that has none."""
    kind = KINDS[config.kind]
    if kind.coefficient is None:
        return None
    if config.entry.penalises:
        return 0.0  # the penalty is in the loss
    if kind.needs_price:
        return config.coefficient
    return config.budget_price / (config.budget * (config.max_new_tokens if config.budget_per_token else 1))


def warning_of_scale(config: TrainConfig) -> str:
    """The warning of a `baseline` whose divisor changes what the constraint's settings mean; empty if it does not."""
    constraint = training_constraint(config, 0, multiplier=1.0)  # from 0 the controller raises it
    if config.entry.compares and config.baseline == "grpo" and constraint.has_direct_term:
        return of_a_scaled_direct_term("--baseline grpo", "--baseline rloo")
    return ""


def evaluation_constraint(config: TrainConfig) -> Constraint:
    """The measure of every method: the cost's sum against the final budget.

    `worst_case` bounds something else, so its sum is that of reverse KL, as for a method that says nothing of a cost.
    So is that of `lagrangian` with k1 or k3: it keeps to no budget, and these are estimates of reverse KL.
    """
    estimates = config.kind == "lagrangian" and config.cost in ("k1", "k3")
    of_kl = config.kind == "worst_case" or estimates
    return Constraint(
        cost="reverse_kl" if of_kl else config.cost,
        budget=config.budget,
        per_token=config.budget_per_token,
        kind="hinge",
        penalty=config.penalty,
        discrepancy_weight=config.discrepancy_weight,
        beta=config.jsd_beta,
        cost_clamp=None if of_kl else config.cost_clamp or None,
    )


def budget_at(config: TrainConfig, step: int) -> float:
    """The budget of a step, counted from 0: from `budget_start` to `budget` in a straight line, then constant."""
    if step >= config.budget_steps:
        return config.budget
    share = step / config.budget_steps
    return config.budget_start + share * (config.budget - config.budget_start)
