"""The constraint that another trainer's configuration states, and the constraints that such a trainer cannot hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cmdp_fast as cf
from cmdp_fast.errors import InputError
from cmdp_fast.integrations.constraint import check_supported, constraint_from_settings

GIVEN = {"budget": 2, "cost": "k1"}


def test_settings_make_the_one_class() -> None:
    assert constraint_from_settings(GIVEN, "here") == cf.Constraint(budget=2, cost="k1")
    settings = {**GIVEN, "kind": "barrier", "coefficient": 0.5}
    assert constraint_from_settings(settings, "here") == cf.Constraint(
        budget=2, cost="k1", kind="barrier", coefficient=0.5
    )
    worst_case = constraint_from_settings({"budget": 2.0, "cost": "nll", "kind": "worst_case"}, "here")
    assert worst_case.reduction == "mean" and not worst_case.at_crossing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, r"here has \[\], expected at least 'budget' and 'cost'"),
        ({"budget": 2.0}, r"here has \['budget'\], expected at least"),
        ({**GIVEN, "budgett": 1}, r"here has \['budgett'\], expected some of budget, cost, kind"),
        ({**GIVEN, "gamma": 0.9}, r"here has \['gamma'\]"),
        ({**GIVEN, "budget": -1.0}, r"budget=-1.0, expected a number of nats that is not negative"),
        ({**GIVEN, "budget": True}, "budget=True"),
        ({**GIVEN, "budget": "2"}, "budget='2'"),
        ({**GIVEN, "kind": "pid"}, "kind='pid': its multiplier has a state"),
        ({**GIVEN, "kind": "nonsense"}, "kind='nonsense' is unknown"),
        ({**GIVEN, "cost": "jsd"}, "cost='jsd' is unknown; expected one of reverse_kl, forward_kl, k1, k3, nll"),
        ({**GIVEN, "kind": "worst_case"}, "kind='worst_case' is defined for cost='nll'"),
        ({**GIVEN, "kind": "lagrangian"}, "needs coefficient="),
        ({**GIVEN, "penalty": "1"}, "penalty must be a number"),
        ({**GIVEN, "discrepancy_weight": float("inf")}, "discrepancy_weight must be finite"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        constraint_from_settings(settings, "here")


def test_a_penalty_without_a_gradient_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="kind='saute' with cost='forward_kl'"):
        constraint_from_settings({"budget": 2.0, "cost": "forward_kl", "kind": "saute"}, "here")


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (cf.Constraint(budget=2.0, cost="k1", kind="pid", coefficient=0.0), "kind='pid'"),
        (cf.Constraint(budget=2.0, cost="jsd"), "cost='jsd'"),
        (cf.Constraint(budget=torch.ones(2), cost="k1"), "budget=tensor"),
    ],
)
def test_a_constraint_that_no_other_trainer_holds_is_refused(constraint: cf.Constraint, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_supported(constraint)
