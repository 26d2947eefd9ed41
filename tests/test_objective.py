"""Returns, coefficients, advantages, surrogate, controller and metrics: worked numbers and properties."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from exact import ops, vectors
from torch import Tensor

from cmdp_fast import objective
from cmdp_fast.constraint import KINDS

EXAMPLE = vectors("worked_example")


def row(values: list[float]) -> Tensor:
    return torch.tensor([values], dtype=torch.float32)


COST, TASK = row(EXAMPLE["cost"]), row(EXAMPLE["task_reward"])
MASK = torch.tensor([[False, True, True, False, True, True, True, False]])


def spread(values: Tensor, fill: float = math.nan) -> Tensor:
    """The example's five tokens among three masked ones that hold ``fill``."""
    return torch.full(MASK.shape, fill, dtype=values.dtype).masked_scatter(MASK, values)


EXACT, SAMPLED = ops.Constraint(budget=1.0), ops.Constraint(budget=1.0, cost="k1")  # as far as the score goes


def held(kind: str, budget: float | Tensor = 0.5, **fields: Any) -> ops.Constraint:
    """A constraint of a kind, with some coefficient where it needs one."""
    priced = kind in ("lagrangian", "pid", "barrier")
    fields = {"coefficient": 0.5} | fields if priced else {k: v for k, v in fields.items() if k != "coefficient"}
    if kind == "worst_case":  # of which nothing else than the prefix mean of nll is allowed
        fields = {k: v for k, v in fields.items() if k not in ("reduction", "gamma")}
    return ops.Constraint(budget=budget, kind=kind, **fields)


def example(name: str, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Modified reward and task part of the worked example."""
    data = EXAMPLE[name]
    kind = name.split("_")[0]
    cost, task = (COST, TASK) if mask is None else (spread(COST), spread(TASK))
    trace = ops.budget_trace(cost, EXAMPLE["budget"], mask=mask)
    reward = ops.modified_reward(
        task,
        cost,
        trace,
        kind=kind,
        penalty=data.get("penalty", 1.0),
        penalty_at=data.get("penalty_at"),
        discrepancy_weight=data.get("discrepancy_weight", 1.0),
        coefficient=data.get("lambda"),
        mask=mask,
    )
    return reward, objective.task_part(task, trace, held(kind))


# --------------------------------------------------------------------------------------------------------------
# Returns and score coefficients


@pytest.mark.parametrize("name", ["saute", "cmdp", "cmdp_every", "hinge", "lagrangian"])
def test_worked_example(name: str) -> None:
    """The numbers are binary fractions, so equality is exact."""
    data = EXAMPLE[name]
    reward, task = example(name)
    assert torch.equal(reward, row(data["modified_reward"]))
    assert torch.equal(objective.returns_to_go(reward), row(data["return_to_go"]))
    if "return_to_go_gamma_half" in data:
        assert torch.equal(objective.returns_to_go(reward, gamma=0.5), row(data["return_to_go_gamma_half"]))
    if "score_coefficient" in data:
        score = objective.score_coefficient(reward, task, EXACT)
        assert torch.equal(score, row(data["score_coefficient"]))
    score = objective.score_coefficient(reward, task, SAMPLED)
    assert torch.equal(score, row(data["return_to_go"]))


def test_score_coefficient_discounts_what_comes_later() -> None:
    """The penalties of saute at gamma .5: each token's later ones, halved once more than in its return."""
    reward, task = example("saute")
    score = objective.score_coefficient(reward, task, EXACT, gamma=0.5)
    assert torch.equal(score, row([-0.4375, -0.875, -0.75, -0.5, 0.0]))
    kept_reward, kept_task = example("hinge")
    score = objective.score_coefficient(kept_reward, kept_task, EXACT, gamma=0.5)
    assert torch.equal(score[:, 3:], row([0.3125, 1.0]))


@pytest.mark.parametrize("gamma", [1.0, 0.5])
@pytest.mark.parametrize("name", ["saute", "saute_crossing", "cmdp", "cmdp_every", "hinge", "lagrangian"])
def test_masked_tokens_neither_count_nor_discount(name: str, gamma: float) -> None:
    reward, task = example(name)
    spread_reward = spread(reward)
    _, spread_task = example(name, MASK)
    expected = objective.returns_to_go(reward, gamma=gamma)
    assert torch.equal(objective.returns_to_go(spread_reward, mask=MASK, gamma=gamma), spread(expected, 0.0))
    for constraint in (EXACT, SAMPLED):
        expected = objective.score_coefficient(reward, task, constraint, gamma=gamma)
        score = objective.score_coefficient(spread_reward, spread_task, constraint, gamma=gamma, mask=MASK)
        assert torch.equal(score, spread(expected, 0.0))


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.5, 0.0])
@pytest.mark.parametrize("width", [0, 1, 2, 3, 64, 1000])
def test_returns_match_the_recurrence(width: int, gamma: float) -> None:
    """A thousand tokens at gamma .5 discount by 1e-301: nothing may be divided by such a number."""
    generator = torch.Generator().manual_seed(width)
    reward = torch.randn(3, width, dtype=torch.float64, generator=generator)
    mask = torch.rand(3, width, generator=generator) < 0.7
    expected, following = torch.zeros_like(reward), torch.zeros(3, dtype=torch.float64)
    for t in reversed(range(width)):
        following = torch.where(mask[:, t], reward[:, t] + gamma * following, following)
        expected[:, t] = torch.where(mask[:, t], following, 0.0)
    actual = objective.returns_to_go(reward, mask=mask, gamma=gamma)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.5, 0.99, 0.0])
def test_an_infinite_reward_reaches_back_however_small_its_discount(gamma: float) -> None:
    """The discount of 390 tokens underflows to 0, and 0 times infinity is NaN. At gamma 0 nothing reaches back."""
    reward = torch.ones(1, 400)
    reward[0, 390] = -math.inf
    returns, score = (
        objective.returns_to_go(reward, gamma=gamma),
        objective.score_coefficient(reward, torch.zeros_like(reward), EXACT, gamma=gamma),
    )
    assert (returns[0, :391] == -math.inf).all() if gamma else returns[0, 389] == 1
    assert (score[0, :390] == -math.inf).all() if gamma else not score.any()
    assert returns[0, 391:].isfinite().all() and returns[0, 390] == -math.inf


def test_task_part() -> None:
    task = row([1.0, 2.0, 4.0, 8.0, 16.0])
    trace = ops.budget_trace(COST, 0.5)
    expected = {"cmdp": [1, 2, 0, 0, 0], "barrier": [1, 2, 0, 0, 0], "hinge": [1, 2, 4, 8, 16]}
    expected |= {"saute": expected["cmdp"], "worst_case": expected["cmdp"]}
    expected |= {"lagrangian": expected["hinge"], "pid": expected["hinge"]}
    assert expected.keys() == set(KINDS)
    for kind, values in expected.items():
        assert torch.equal(objective.task_part(task, trace, held(kind)), row(values))
    # C = d is feasible for the others; log(1 - C/d) is not finite there
    at_edge = ops.budget_trace(COST, 0.5625)
    assert torch.equal(objective.task_part(task, at_edge, held("cmdp")), row([1, 2, 4, 0, 0]))
    assert torch.equal(objective.task_part(task, at_edge, held("barrier")), row([1, 2, 0, 0, 0]))
    lost = row([1.0, 2.0, math.inf, -math.inf, math.nan])
    assert torch.equal(objective.task_part(lost, trace, held("cmdp")), row([1, 2, 0, 0, 0]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_of_masked_tokens_is_not_looked_at(kind: str) -> None:
    """Its entries may be NaN, and what says whether they violate anything."""
    constraint = held(kind, 0.15, **({} if kind == "worst_case" else {"gamma": 0.5}))
    trace, task = ops.budget_trace(spread(COST), constraint=constraint, mask=MASK), spread(TASK)
    for odd, fill in itertools.product((trace.violated | ~MASK, trace.violated & MASK), (math.nan, 9.0)):
        names = ("cumulative", "remaining", "excess")
        junk = trace._replace(violated=odd, **{name: torch.where(MASK, getattr(trace, name), fill) for name in names})
        part, direct = (
            objective.task_part(task, junk, constraint, mask=MASK),
            objective.direct_coefficient(junk, constraint, mask=MASK),
        )
        assert torch.equal(part, objective.task_part(spread(TASK, 0.0), trace, constraint, mask=MASK))
        assert torch.equal(direct, objective.direct_coefficient(trace, constraint, mask=MASK))
        assert direct.any() == (kind not in ("saute", "worst_case")) and not part[~MASK].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_task_part_has_memory_of_its_own(kind: str) -> None:
    task = TASK.clone()
    objective.task_part(task, ops.budget_trace(COST, 9.0), held(kind)).fill_(7.0)
    assert torch.equal(task, TASK)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)])
def test_of_no_tokens_there_are_no_coefficients(kind: str, shape: tuple[int, int]) -> None:
    none, constraint = torch.zeros(shape), held(kind)
    trace = ops.budget_trace(none, constraint=constraint)
    made = [
        objective.direct_coefficient(trace, constraint),
        objective.task_part(none, trace, constraint),
        objective.score_coefficient(none, none, constraint),
        objective.returns_to_go(none),
        objective.whiten(none).advantage,
    ]
    assert all(tensor.shape == shape for tensor in made)


def test_nothing_but_the_loss_is_differentiable() -> None:
    cost, task, reward = (values.clone().requires_grad_() for values in (COST, TASK, TASK))
    for kind in KINDS:
        constraint = held(kind)
        trace = ops.budget_trace(COST, constraint=constraint)
        trace = trace._replace(remaining=trace.remaining.clone().requires_grad_())
        made = [objective.task_part(task, trace, constraint), objective.direct_coefficient(trace, constraint)]
        made += [objective.score_coefficient(reward, task, each) for each in (constraint, SAMPLED)]
        assert not any(tensor.requires_grad for tensor in made), kind
    metrics = objective.constraint_metrics(cost, ops.budget_trace(COST, 0.5), mean_budget=0.1)
    assert not objective.returns_to_go(reward).requires_grad
    assert not any(value.requires_grad for value in metrics.values())


# --------------------------------------------------------------------------------------------------------------
# Direct coefficients (their values against finite differences: test_gradient.py)


@pytest.mark.parametrize("kind", ["cmdp", "hinge"])
def test_direct_term_acts_on_every_token_of_a_violating_sequence(kind: str) -> None:
    weighted = {"kind": kind, "discrepancy_weight": 2.0}
    each = ops.Constraint(budget=torch.tensor([0.5, 1.0]), **weighted)
    direct = objective.direct_coefficient(ops.budget_trace(COST.repeat(2, 1), constraint=each), each)
    assert torch.equal(direct, torch.tensor([[2.0] * 5, [0.0] * 5]))
    discounted = ops.Constraint(budget=0.25, gamma=0.5, **weighted)
    direct = objective.direct_coefficient(ops.budget_trace(COST, constraint=discounted), discounted)
    assert torch.equal(direct, row([2.0, 1.0, 0.5, 0.25, 0.125]))
    mean = ops.Constraint(budget=0.1875, reduction="mean", **weighted)
    direct = objective.direct_coefficient(ops.budget_trace(COST, constraint=mean), mean)
    torch.testing.assert_close(direct, row([0.4] * 5))


def test_the_direct_term_weighs_as_the_reward_did() -> None:
    """Weight and discount are told once, to the constraint: what the reward was made with is what the loss gets."""
    logits, tokens = torch.zeros(1, 4, 3), torch.zeros(1, 4, dtype=torch.long)
    teacher = torch.tensor([2.0, 0.0, 0.0]).expand(1, 4, 3)
    constraint = ops.Constraint(budget=0.1, discrepancy_weight=5.0, gamma=0.9)
    out = ops.constrained_reward(logits, teacher, tokens, torch.zeros(1, 4), constraint=constraint)
    assert bool(out.trace.violated[0, -1])
    torch.testing.assert_close(objective.direct_coefficient(out.trace, constraint), row([5.0, 4.5, 4.05, 3.645]))
    for wrong in ("cmdp", None, {"kind": "cmdp"}):
        for call in (
            lambda: objective.direct_coefficient(out.trace, wrong),  # noqa: B023
            lambda: objective.task_part(torch.zeros(1, 4), out.trace, wrong),  # noqa: B023
            lambda: objective.score_coefficient(out.reward, out.reward, wrong),  # noqa: B023
        ):
            with pytest.raises(TypeError, match=r"constraint must be a cmdp_fast\.Constraint, got"):
                call()


@pytest.mark.parametrize("edge", ["strict", "saute"])
def test_direct_term_at_the_edge_follows_the_violation(edge: str) -> None:
    constraint = held("hinge", 1.0, edge=edge)
    trace = ops.budget_trace(COST, constraint=constraint)
    direct = objective.direct_coefficient(trace, constraint)
    assert torch.equal(direct > 0, trace.violated[:, -1:].expand_as(direct))


def test_direct_coefficients_of_the_other_kinds() -> None:
    trace = ops.budget_trace(COST, 0.5)
    for kind in ("saute", "worst_case"):
        assert not objective.direct_coefficient(trace, held(kind)).any()
    for kind in ("lagrangian", "pid"):
        for account in ({}, {"gamma": 0.5}, {"reduction": "mean"}):  # whatever the account is, the price is of the cost
            priced = held(kind, coefficient=0.25, **account)
            trace = ops.budget_trace(COST, constraint=priced)
            assert torch.equal(objective.direct_coefficient(trace, priced), row([0.25] * 5))
    trace = ops.budget_trace(COST, 0.5)
    for kind in ("cmdp", "hinge"):
        plain, priced = held(kind), ops.Constraint(budget=0.5, kind=kind, coefficient=0.25)
        expected = objective.direct_coefficient(trace, plain) + 0.25
        assert torch.equal(objective.direct_coefficient(trace, priced), expected)
        assert ops.Constraint(budget=1.0, kind=kind, discrepancy_weight=0.0, coefficient=0.25).has_direct_term
    barrier = objective.direct_coefficient(trace, held("barrier", barrier_slope=8.0))
    torch.testing.assert_close(barrier, row([1.6, 1.6, 8.0, 8.0, 8.0]))  # 1.6 = .5 / (.5 - .1875)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cost_of_the_sampled_action_has_no_direct_term(kind: str) -> None:
    """It is detached: whatever its weight would be, nothing flows through it."""
    constraint = held(kind, 0.15, cost="nll" if kind == "worst_case" else "k1")
    trace = ops.budget_trace(COST, constraint=constraint)
    assert trace.violated.any() and not objective.direct_coefficient(trace, constraint).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_masked_tokens_do_not_change_direct_coefficients(kind: str, reduction: str) -> None:
    budget = 0.5 if reduction == "sum" else 0.1875
    constraint = held(kind, budget, reduction=reduction, gamma=0.5 if reduction == "sum" else 1.0)
    expected = objective.direct_coefficient(ops.budget_trace(COST, constraint=constraint), constraint)
    trace = ops.budget_trace(spread(COST), constraint=constraint, mask=MASK)
    actual = objective.direct_coefficient(trace, constraint, mask=MASK)
    torch.testing.assert_close(actual, spread(expected, 0.0))


def test_direct_coefficient_counts_nan_as_over_budget() -> None:
    trace = ops.budget_trace(row([0.1, math.nan]), 1.0)
    assert torch.equal(objective.direct_coefficient(trace, EXACT), row([1.0, 1.0]))


def test_barrier_total() -> None:
    """The logarithms telescope: the total is kappa log(1 - C_T/d)."""
    data = EXAMPLE["barrier"]
    trace = ops.budget_trace(COST.double(), data["budget"])
    reward = ops.modified_reward(0 * TASK.double(), COST.double(), trace, kind="barrier", coefficient=data["kappa"])
    assert objective.returns_to_go(reward)[0, 0].item() == pytest.approx(data["total"], abs=1e-12)


# --------------------------------------------------------------------------------------------------------------
# Controller


def test_pid_of_the_vectors() -> None:
    data = EXAMPLE["pid"]
    controller = objective.PIDController(
        **{name: data[name] for name in ("kp", "ki", "kd", "d_delay", "ema_p", "ema_d", "initial_integral")}
    )
    assert controller == objective.PIDController()
    for cost, expected in zip(data["mean_cost"], data["lambda"], strict=True):
        assert controller.update(cost, data["budget"]) == pytest.approx(expected, abs=1e-12)
    assert controller.coefficient == pytest.approx(data["lambda"][-1], abs=1e-12)


def test_pid_derivative_looks_back_by_its_delay() -> None:
    controller = objective.PIDController(kp=0.0, ki=0.0, kd=1.0, ema_d=0.0, d_delay=2, initial_integral=0.0)
    costs = [3.0, 5.0, 6.0, 6.0, 1.0, 8.0]
    assert [controller.update(cost, 0.0) for cost in costs] == [3.0, 5.0, 3.0, 1.0, 0.0, 2.0]


def test_pid_neither_saves_up_nor_rewards_a_fall() -> None:
    controller = objective.PIDController(kp=0.0, ki=1.0, kd=0.0, initial_integral=0.0)
    assert [controller.update(cost, 5.0) for cost in (0.0, 6.0)] == [0.0, 1.0]
    controller = objective.PIDController(kp=0.0, ki=1.0, kd=1.0, ema_d=0.0, d_delay=1, initial_integral=0.0)
    assert [controller.update(cost, 0.0) for cost in (10.0, 0.0)] == [20.0, 10.0]


def test_pid_continues_from_its_state() -> None:
    original, resumed = objective.PIDController(d_delay=3), objective.PIDController(d_delay=3)
    costs = torch.tensor([30.0, 20.0, 40.0, 35.0, 10.0, 26.0])
    for cost in costs[:4]:
        original.update(cost, 25.0)
    resumed.load_state_dict(original.state_dict())
    assert resumed.coefficient == original.coefficient
    assert [resumed.update(c, 25.0) for c in costs[4:]] == [original.update(c, 25.0) for c in costs[4:]]


def test_pid_rejects_what_would_spoil_its_state() -> None:
    controller = objective.PIDController()
    before = controller.state_dict()
    for cost in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            controller.update(cost, 25.0)
    with pytest.raises(ValueError, match="expected"):
        controller.load_state_dict({"integral": 0.0})
    assert controller.state_dict() == before
    with pytest.raises(ValueError, match="d_delay=0"):
        objective.PIDController(d_delay=0)


def test_pid_state_is_of_plain_floats_whatever_it_was_given() -> None:
    """So that a checkpoint takes it as JSON, and it is taken back."""
    numbers = np.float32(0.5), np.float64(0.25), torch.tensor(0.125)
    for kp, budget in itertools.product(numbers, numbers):
        controller = objective.PIDController(kp=kp, ki=kp, kd=kp, initial_integral=kp)
        controller.update(torch.tensor(3.0), budget)
        state = controller.state_dict()
        assert {type(value) for value in (*state.values(), *state["past_costs"])} == {float, list}
        objective.PIDController().load_state_dict(json.loads(json.dumps(state)))


@pytest.mark.parametrize("kind", [torch.tensor, np.float32, np.float64, int])
def test_pid_takes_the_states_of_earlier_versions(kind: Any) -> None:
    """They held what the controller was given, which `torch.save` keeps."""
    controller = objective.PIDController()
    state = {name: kind(2.0) for name in controller.state_dict()} | {"past_costs": [kind(0.0), kind(1.0)]}
    controller.load_state_dict(state)
    now = controller.state_dict()
    assert now == {**dict.fromkeys(now, 2.0), "past_costs": [0.0, 1.0]}
    assert {type(value) for value in (controller.coefficient, controller._integral, *controller._past_costs)} == {float}


ODD = [None, True, "1", [], [1.0], math.nan, math.inf, 10**400, torch.tensor([1.0, 2.0]), torch.tensor(True)]
ODD += [np.bool_(True), torch.tensor(math.nan), torch.empty((), device="meta"), 1j]


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("name", ["integral", "ema_delta", "past_costs", "coefficient"])
def test_a_state_of_anything_else_is_refused(name: str, value: Any) -> None:
    if name == "past_costs" and isinstance(value, list) and value == [1.0]:
        value = [[1.0]]
    controller = objective.PIDController()
    with pytest.raises(ValueError, match=name):
        controller.load_state_dict({**controller.state_dict(), name: value})


# --------------------------------------------------------------------------------------------------------------
# Metrics


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


# --------------------------------------------------------------------------------------------------------------
# Bad input


def test_errors_say_what_was_given() -> None:
    trace = ops.budget_trace(COST, 0.5)
    for alpha in (0, -0.5, 1.001, math.nan):
        with pytest.raises(ValueError, match=f"alpha={alpha}, expected a fraction"):
            objective.constraint_metrics(COST, trace, alpha=alpha)
    with pytest.raises(ValueError, match="at least one token"):
        objective.constraint_metrics(COST[:0], ops.budget_trace(COST[:0], 0.5))
    with pytest.raises(ValueError, match="cumulative has shape"):
        objective.constraint_metrics(COST[:, :3], trace)
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        objective.returns_to_go(TASK[0])
    with pytest.raises(ValueError, match="mask has shape"):
        objective.returns_to_go(TASK, mask=MASK)
    with pytest.raises(TypeError, match=r"torch\.bool"):
        objective.returns_to_go(TASK, mask=torch.ones_like(TASK))
    with pytest.raises(ValueError, match="task_part has shape"):
        objective.score_coefficient(TASK, TASK[:, :3], EXACT)
