"""A `cf.Constraint` from the configuration of another trainer, and the limits of such trainers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cmdp_fast as cf
from cmdp_fast import checks
from cmdp_fast.errors import InputError

SAMPLED_COSTS = ("k1", "k3", "nll")
"""Costs that the log-probabilities of the sampled token give, the student's and the teacher's."""

SETTINGS = ("budget", "cost", "kind", "penalty", "discrepancy_weight", "coefficient", "cost_clamp")


def constraint_from_settings(
    settings: Mapping[str, Any] | None, where: str, *, keeps_multiplier: bool = False
) -> cf.Constraint:
    """The constraint that the section ``where`` of a configuration states: some of `SETTINGS`, fields of
    `cf.Constraint`, at least ``budget`` (nats per completion) and ``cost``. ``keeps_multiplier``: the caller
    checkpoints the state of ``pid``, which is refused otherwise.

    Raises InputError for a key that is unknown or missing, for a value that is not allowed, and as `check_supported`.
    Warns of ``saute`` with a cost that does not depend on the action.
    """
    if not settings or not {"budget", "cost"} <= set(settings):
        raise InputError(f"{where} has {sorted(settings or {})}, expected at least 'budget' and 'cost'")
    if unknown := set(settings) - set(SETTINGS):
        raise InputError(f"{where} has {sorted(unknown)}, expected some of {', '.join(SETTINGS)}")
    given = {str(name): value for name, value in settings.items()}
    _check_budget(given["budget"])
    if not keeps_multiplier:
        _check_kind(given.get("kind"))
    try:
        _check_cost(given["cost"])
        constraint = cf.Constraint(**given)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    constraint.warn_of_a_penalty_without_gradient(stacklevel=2)
    return constraint


def check_supported(constraint: cf.Constraint) -> None:
    """Raises InputError for a constraint that other trainers cannot hold: of kind ``pid``, whose multiplier has a state
    that they would not checkpoint, with a cost that needs the whole logits, or with a budget per sequence."""
    _check_budget(constraint.budget)
    _check_kind(constraint.kind)
    try:
        _check_cost(constraint.cost)
    except ValueError as error:
        raise InputError(str(error)) from error


def _check_budget(budget: object) -> None:
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not budget >= 0:
        raise InputError(f"budget={budget!r}, expected a number of nats that is not negative")


def _check_kind(kind: object) -> None:
    if kind == "pid":
        raise InputError("kind='pid': its multiplier has a state that is not checkpointed here; use 'lagrangian'")


def _check_cost(cost: object) -> None:
    checks.choice("cost", cost, ("reverse_kl", "forward_kl", *SAMPLED_COSTS))
