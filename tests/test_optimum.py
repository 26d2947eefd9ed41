"""The optima that trainings are held against: the solver of optimum.py, and problems made of the tree (exact.py)."""

from __future__ import annotations

import pytest
import torch
from exact import Problem, Setting, ascend, bandit, repeated, roll_out, tempered, tree, vectors
from optimum import best_value, tilted

TREE, BANDIT = vectors("tree"), vectors("bandit")


def test_the_solver_finds_the_optimum_of_the_tree():
    assert best_value(tree(), TREE["budget"]) == pytest.approx(TREE["per_trajectory_budget"]["value"], abs=1e-9)


@pytest.mark.parametrize("case", BANDIT["reverse_kl"], ids=lambda case: f"budget{case['budget']}")
def test_the_solver_finds_the_optimum_of_the_bandit(case):
    assert best_value(bandit(), case["budget"]) == pytest.approx(case["value"], abs=1e-8)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_no_ascent_beats_the_solver_and_hinge_comes_close(temperature):
    """A policy of an exact ascent under the penalty that is exact, at temperatures whose optimum no vector has."""
    problem, budget = tempered(tree(), temperature), TREE["budget"]
    _, rollout = ascend(problem, Setting("hinge", budget, weight=3.0), steps=300)
    value, best = rollout.expect(problem.reward.sum(1)).item(), best_value(problem, budget)
    over = max(0.0, float(rollout.totals.max()) - budget)
    assert best - 0.002 < value < best + over  # a nat more is worth less than 1 at these budgets


def test_a_tilt_without_a_budget_is_the_teacher_and_one_of_plenty_the_best_action():
    teacher, value = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([[0.1, 0.2, 0.9]], dtype=torch.float64)
    none, plenty = (tilted(teacher, value, torch.tensor([budget]).double()).item() for budget in (0.0, 5.0))
    assert none == pytest.approx(float(teacher @ value[0]), abs=1e-4)
    assert plenty == pytest.approx(0.9, abs=1e-9)


def at_optimum(problem: Problem, times: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The totals [P] and the expected reward of the tree's best policy."""
    optimum = TREE["per_trajectory_budget"]
    logits = torch.tensor([optimum["root"], *optimum["child"]], dtype=torch.float64).log()
    rollout = roll_out(problem, logits, Setting("hinge", times * TREE["budget"]))
    return rollout.totals, rollout.expect(problem.reward.sum(1))


@pytest.mark.parametrize("times", [1, 2, 4])
def test_trees_in_a_row_have_the_optimum_of_one(times):
    """The best policy of one spends every budget of all of them, and earns the same on average."""
    problem = repeated(tree(), times)
    assert problem.tokens.shape == (9**times, 2 * times)
    totals, value = at_optimum(problem, times)
    torch.testing.assert_close(totals, torch.full_like(totals, times * TREE["budget"]), rtol=0, atol=1e-6)
    assert value.item() == pytest.approx(TREE["per_trajectory_budget"]["value"], abs=1e-6)


def test_a_path_of_trees_in_a_row_is_a_path_after_another():
    problem, one = repeated(tree(), 2), tree()
    row = 9 * 5 + 7  # the sixth path and then the eighth
    assert problem.tokens[row].tolist() == [*one.tokens[5].tolist(), *one.tokens[7].tolist()]
    assert problem.state[row].tolist() == [*one.state[5].tolist(), *one.state[7].tolist()]
    assert problem.reward[row].tolist() == [0.0, 0.0, 0.0, float(one.reward[[5, 7], 1].mean())]
