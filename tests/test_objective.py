"""Returns, coefficients and the task's part of the reward: worked numbers and properties."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from exact import ops
from torch import Tensor
from worked import COST, EXAMPLE, MASK, TASK, row, spread

from cmdp_fast import objective
from cmdp_fast.constraint import KINDS

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
