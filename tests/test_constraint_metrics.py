"""The metrics of a constraint: worked numbers, and what counts."""

from __future__ import annotations

import math

import pytest
import torch
from exact import ops
from torch import Tensor
from worked import COST, EXAMPLE, MASK, row, spread

from cmdp_fast import objective


def test_constraint_metrics() -> None:
    cost = torch.tensor([[0.5, 0.25, 0.25, math.nan], [1.0, 1.0, 0.5, 0.5], [0.0, 3.0, math.nan, math.nan]])
    mask = ~cost.isnan()
    trace = ops.budget_trace(cost, 1.0, mask=mask)
    metrics = objective.constraint_metrics(
        cost, trace, mask=mask, correct=torch.tensor([True, False, True]), mean_budget=0.5, alpha=0.5
    )
    expected = {
        "accuracy": 2 / 3,
        "constraint_satisfaction": 1 / 3,  # C_T = 1, 3, 3; the first is at the budget and feasible
        "never_violated": 1 / 3,
        "prefix_satisfaction": 1 / 3,
        "correct_and_feasible": 1 / 3,
        "mean_excess": 4 / 3,
        "mean_cumulative": 7 / 3,
        "cvar": 3.0,
        "mean_token_cost": 7 / 9,
        "max_token_cost": 3.0,
        "first_violation": (1.0 + 1 / 4 + 1 / 2) / 3,
    }
    assert metrics.keys() == expected.keys()
    for name, number in expected.items():
        assert metrics[name].shape == ()
        assert metrics[name].item() == pytest.approx(number, rel=1e-6), name
    without = objective.constraint_metrics(cost, trace, mask=mask)
    assert without.keys() == expected.keys() - {"accuracy", "correct_and_feasible", "prefix_satisfaction"}


def test_completions_without_a_token_count_nowhere() -> None:
    """Masked ones between those of the test above change no metric, whatever is written there."""
    cost = torch.tensor([[0.5, 0.25, 0.25, math.nan], [1.0, 1.0, 0.5, 0.5], [0.0, 3.0, math.nan, math.nan]])
    mask = ~cost.isnan()
    correct, limit = torch.tensor([True, False, True]), torch.tensor([0.5, 2.0, 0.5])
    trace, weight = ops.budget_trace(cost, 1.0, mask=mask), torch.tensor([0.5, 1.0, 0.25])
    expected = objective.constraint_metrics(
        cost, trace, mask=mask, correct=correct, mean_budget=limit, alpha=0.5, weight=weight
    )
    place = torch.tensor([1, 2, 4])

    def among(value: Tensor, filling: float) -> Tensor:
        return torch.full((6, *value.shape[1:]), filling).to(value.dtype).index_copy(0, place, value)

    wide = among(cost, 1e4), among(mask, 0.0)
    for right in (0.0, 1.0):
        metrics = objective.constraint_metrics(
            wide[0],
            ops.budget_trace(wide[0], 1.0, mask=wide[1]),
            mask=wide[1],
            correct=among(correct, right),
            mean_budget=among(limit, 9.0),
            alpha=0.5,
            weight=among(weight, 8.0),
        )
        assert metrics.keys() == expected.keys()
        for name, value in metrics.items():
            assert torch.equal(value, expected[name]), name


def test_where_no_completion_has_a_token_there_is_no_metric() -> None:
    cost, mask = torch.full((2, 3), 5.0), torch.zeros(2, 3, dtype=torch.bool)
    metrics = objective.constraint_metrics(
        cost, ops.budget_trace(cost, 1.0, mask=mask), mask=mask, correct=torch.ones(2), mean_budget=1.0
    )
    assert all(value.shape == () and value.isnan() for value in metrics.values()), metrics


def test_a_violation_that_was_made_good_is_satisfied_and_violated() -> None:
    """A violation is absorbing: what k1 gives back later, or a prefix mean that falls, does not bring the reward
    back."""
    cost = torch.tensor([[1.0, -0.75], [0.25, 0.25], [0.25, 0.75]])  # C_T = .25, .5, 1
    reward = torch.tensor([[0.0, 1.0]]).expand(3, 2)
    trace = ops.budget_trace(cost, 0.5)
    metrics = objective.constraint_metrics(cost, trace, correct=torch.ones(3))
    assert metrics["constraint_satisfaction"].item() == pytest.approx(2 / 3)
    assert metrics["correct_and_feasible"].item() == pytest.approx(2 / 3)
    assert metrics["never_violated"].item() == pytest.approx(1 / 3)
    assert metrics["mean_excess"].item() == pytest.approx(0.5 / 3)  # nothing for what the others have left
    modified = ops.modified_reward(reward, cost, trace, penalty=0.0, discrepancy_weight=0.0).sum(1)
    assert modified.tolist() == [0.0, 1.0, 0.0]  # of the first, which ends within its budget, too
    mean = objective.constraint_metrics(cost[:1], ops.budget_trace(cost[:1], 0.5, reduction="mean"))
    assert mean["constraint_satisfaction"] == 1 and mean["never_violated"] == 0


def test_prefix_satisfaction_of_the_vectors() -> None:
    trace = ops.budget_trace(COST.repeat(2, 1), 1.0)
    limits = torch.tensor([EXAMPLE["prefix_mean"]["budget_mean"], 0.203125])
    metrics = objective.constraint_metrics(COST.repeat(2, 1), trace, mean_budget=limits)
    assert metrics["prefix_satisfaction"] == 0.5  # m_4 = .203125 is over .2, though m_5 is not
    masked = spread(COST)
    for limit, expected in ((0.2, 0.0), (0.203125, 1.0)):  # a masked token is not counted
        trace = ops.budget_trace(masked, 1.0, mask=MASK)
        metrics = objective.constraint_metrics(masked, trace, mask=MASK, mean_budget=limit)
        assert metrics["prefix_satisfaction"] == expected


@pytest.mark.parametrize("width", [3, 50, 1000])
def test_prefix_means_keep_to_the_cost_that_they_are_the_means_of(width: int) -> None:
    """Summed in float32 they came to .10000001 and more, where no token violates."""
    for amount in (0.1, 0.3):
        cost = torch.full((1, width), amount)
        trace = ops.budget_trace(cost, amount, reduction="mean")
        for limit in (amount, torch.tensor([amount], dtype=torch.float64)):
            metrics = objective.constraint_metrics(cost, trace, mean_budget=limit)
            assert metrics["prefix_satisfaction"] == metrics["never_violated"] == 1.0
        assert objective.constraint_metrics(cost, trace, mean_budget=amount * 0.999)["prefix_satisfaction"] == 0.0
    fine = torch.full((1, width), 0.1 + 1e-10, dtype=torch.float64)
    trace = ops.budget_trace(fine, 0.1, reduction="mean")
    assert objective.constraint_metrics(fine, trace, mean_budget=0.1)["prefix_satisfaction"] == 0.0


def test_half_precision_costs_are_summed_in_single() -> None:
    """65,504 is the most that a float16 holds."""
    cost = torch.full((2, 100), 1000.0, dtype=torch.float16)
    metrics = objective.constraint_metrics(cost, ops.budget_trace(cost, 1.0), mean_budget=1000.0)
    assert metrics["mean_token_cost"] == 1000.0 and metrics["prefix_satisfaction"] == 1.0


def test_shares_of_double_precision_are_double() -> None:
    """A quotient of two integers is a float32."""
    cost = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    share = objective.constraint_metrics(cost, ops.budget_trace(cost, 0.5))["first_violation"]
    far = torch.tensor([[0.0, 1.0, -1.0]], dtype=torch.float64)
    _, metrics = objective.ppo_loss(far, torch.zeros_like(far), far.sign(), mask=None)
    assert share.item() == pytest.approx(2 / 3, rel=1e-15)
    ratios = {name: metrics[f"clip_ratio/{name}_mean"].item() for name in ("low", "high", "region")}
    assert ratios == pytest.approx({"low": 1 / 3, "high": 1 / 3, "region": 2 / 3}, rel=1e-15)


def test_infinite_cost_outside_the_tail_does_not_spoil_the_cvar() -> None:
    cost = torch.tensor([[math.inf], [math.inf], [1.0], [0.0]])
    assert objective.constraint_metrics(cost, ops.budget_trace(cost, 5.0), alpha=0.25)["cvar"] == math.inf


@pytest.mark.parametrize(("alpha", "expected"), [(0.1, 10.0), (0.15, 29 / 3), (0.3, 9.0), (1.0, 5.5)])
def test_cvar_takes_a_fraction_of_a_sequence(alpha: float, expected: float) -> None:
    cost = torch.arange(1.0, 11.0)[torch.randperm(10, generator=torch.Generator().manual_seed(0)), None]
    trace = ops.budget_trace(cost, 5.0)
    assert objective.constraint_metrics(cost, trace, alpha=alpha)["cvar"].item() == pytest.approx(expected, rel=1e-6)
    assert objective.constraint_metrics(cost, trace)["cvar"] == objective.cvar(cost[:, 0]) == 10.0  # the worst tenth


def test_the_largest_cost_is_that_of_a_real_token_although_negative() -> None:
    cost = row([-1.0, -2.0, math.nan])
    trace = ops.budget_trace(cost, 5.0, mask=~cost.isnan())
    assert objective.constraint_metrics(cost, trace, mask=~cost.isnan())["max_token_cost"] == -1.0


def test_the_cvar_of_a_run_is_weighted() -> None:
    cost, weight = torch.tensor([[1.0], [3.0], [2.0]]), torch.tensor([1.0, 0.0, 3.0])
    metrics = objective.constraint_metrics(cost, ops.budget_trace(cost, 5.0), alpha=0.5, weight=weight)
    assert metrics["cvar"] == metrics["max_token_cost"] - 1.0 == 2.0


def test_cvar_of_weighted_values_is_of_their_dtype() -> None:
    values = torch.tensor([1.0, 3.0, 2.0])
    assert objective.cvar(values, 0.5, weight=torch.tensor([True, False, True])) == 2.0
    worst = objective.cvar(values, 0.5, weight=torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64))
    assert worst.dtype == torch.float32 and worst == 2.5


def test_nan_cost_is_not_satisfied() -> None:
    cost = row([0.1, math.nan])
    metrics = objective.constraint_metrics(cost, ops.budget_trace(cost, 1.0), mean_budget=1.0)
    assert metrics["constraint_satisfaction"] == 0 and metrics["prefix_satisfaction"] == 0
