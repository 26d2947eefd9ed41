"""Exact-gradient ascent reaches optima that are known by other means (tests/vectors/bandit.json and tree.json)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from exact import Problem, Rollout, Setting, ascend, bandit, roll_out, tree, vectors

from cmdp_fast import objective

TREE, BANDIT = vectors("tree"), vectors("bandit")
BUDGET = TREE["budget"]


def value(problem: Problem, rollout: Rollout) -> float:
    return rollout.expect(problem.reward.sum(1)).item()


class Pid:
    """Adapts lambda before each step. These costs are tenths of a nat, so the gains exceed the defaults by far."""

    def __init__(self) -> None:
        self.controller = objective.PIDController(kp=5.0, ki=0.2, kd=5.0, d_delay=3, ema_p=0.0, ema_d=0.5)

    def __call__(self, rollout: Rollout, setting: Setting) -> Setting:
        mean_cost = rollout.expect(rollout.totals)
        return replace(setting, coefficient=self.controller.update(mean_cost, setting.budget))


# --------------------------------------------------------------------------------------------------------------
# Tree: a budget on every trajectory against a budget on the expectation


@pytest.mark.parametrize(
    ("setting", "tolerance"),
    [
        (Setting("hinge", BUDGET, weight=3.0), 0.002),
        # zeroing the reward and the penalty bias the optimum inward, and the more so the larger the penalty
        (Setting("cmdp", BUDGET, penalty=0.5, weight=3.0), 0.003),
    ],
    ids=["hinge", "cmdp"],
)
def test_tree_reaches_the_per_trajectory_optimum(setting: Setting, tolerance: float) -> None:
    problem = tree()
    policy, rollout = ascend(problem, setting)
    optimum = TREE["per_trajectory_budget"]
    assert abs(value(problem, rollout) - optimum["value"]) < tolerance
    assert rollout.totals.max() < BUDGET + 0.002
    assert rollout.totals.min() > BUDGET - 0.002  # at the optimum every path spends its budget
    if setting.kind == "hinge":
        # the value is flat at its maximum: a gap of e in value allows the policy to be off by about sqrt(e)
        expected = torch.tensor([optimum["root"], *optimum["child"]], dtype=torch.float64)
        torch.testing.assert_close(policy, expected, rtol=0, atol=tolerance**0.5)


def test_tree_optimum_of_the_vectors_is_what_it_says() -> None:
    """The policy that the vectors give has the value they give, and every path of it totals the budget."""
    problem, optimum = tree(), TREE["per_trajectory_budget"]
    theta = torch.tensor([optimum["root"], *optimum["child"]], dtype=torch.float64).log()
    rollout = roll_out(problem, theta, Setting("hinge", BUDGET))
    assert value(problem, rollout) == pytest.approx(optimum["value"], abs=1e-7)
    torch.testing.assert_close(rollout.totals, torch.full_like(rollout.totals, BUDGET), rtol=0, atol=1e-7)
    assert rollout.cost[0, 0].item() == pytest.approx(optimum["root_kl"], abs=1e-7)
    child = (rollout.probability * problem.reward.sum(1)).reshape(3, 3).sum(1) / torch.tensor(optimum["root"])
    torch.testing.assert_close(child, torch.tensor(optimum["child_values"], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["lagrangian", "pid"])
def test_tree_soft_constraint_ends_at_the_expected_budget(kind: str) -> None:
    """A price on the mean lets some trajectories violate so that others may stay below: path 0 is over budget."""
    problem, optimum = tree(), TREE["expected_budget"]
    pid = Pid() if kind == "pid" else None
    setting = Setting(kind, BUDGET, coefficient=optimum["lambda"])
    policy, rollout = ascend(problem, setting, rate=0.05, final=0.1, adapt=pid)
    assert value(problem, rollout) == pytest.approx(optimum["value"], abs=1e-4)
    assert rollout.expect(rollout.totals).item() == pytest.approx(BUDGET, abs=1e-4)
    if pid is not None:
        assert pid.controller.coefficient == pytest.approx(optimum["lambda"], abs=1e-3)
    torch.testing.assert_close(policy[0], torch.tensor(optimum["root"], dtype=torch.float64), rtol=0, atol=1e-3)
    totals = torch.tensor(optimum["path_totals"], dtype=torch.float64)
    torch.testing.assert_close(rollout.totals[::3], totals, rtol=0, atol=1e-3)
    assert rollout.totals[0] > BUDGET + 0.1
    feasible = rollout.expect((rollout.totals <= BUDGET).double())
    assert feasible.item() == pytest.approx(optimum["constraint_satisfaction"], abs=1e-3)
    assert optimum["value"] > TREE["per_trajectory_budget"]["value"]


@pytest.mark.parametrize("case", TREE["worst_case_nll"], ids=lambda case: f"budget{case['budget']}")
def test_tree_worst_case_finds_the_best_path_whose_every_prefix_fits(case: dict) -> None:
    problem = tree()
    setting = Setting("worst_case", case["budget"], cost="nll", reduction="mean")
    rollout = roll_out(problem, problem.teacher.log(), setting)
    task = problem.reward.sum(1)
    allowed = ~rollout.trace.violated[:, -1]
    best = torch.where(allowed, task, -torch.inf).argmax()
    assert problem.tokens[best].tolist() == case["best_path"]
    assert task[best].item() == case["reward"]

    # The optimum is deterministic, so a softmax nears it without arriving.
    _, rollout = ascend(problem, setting, start=torch.zeros_like(problem.teacher), steps=300)
    assert rollout.probability.argmax() == best
    assert rollout.probability[best] > 0.95
    assert value(problem, rollout) == pytest.approx(case["reward"], abs=0.05)


def test_teacher_values_of_the_vectors() -> None:
    for problem, data in ((tree(), TREE), (bandit(), BANDIT)):
        rollout = roll_out(problem, problem.teacher.log(), Setting("hinge", 1.0))
        assert value(problem, rollout) == pytest.approx(data["teacher_value"], abs=1e-12)
        assert rollout.totals.abs().max() < 1e-12


# --------------------------------------------------------------------------------------------------------------
# Bandit: one token, so the divergence is the policy's alone


@pytest.mark.parametrize("optimum", BANDIT["reverse_kl"], ids=lambda case: f"d{case['budget']}")
def test_bandit_optima_of_the_vectors_are_what_they_say(optimum: dict) -> None:
    """pi ∝ q exp(r/lambda) is the stationary point of the Lagrangian, spends the budget and has the stated value."""
    problem = bandit()
    theta = problem.teacher.log() + problem.reward.T / optimum["lambda"]
    rollout = roll_out(problem, theta, Setting("lagrangian", optimum["budget"], coefficient=optimum["lambda"]))
    assert value(problem, rollout) == pytest.approx(optimum["value"], abs=1e-9)
    assert rollout.totals[0].item() == pytest.approx(optimum["budget"], abs=1e-9)
    policy = torch.tensor([optimum["policy"]], dtype=torch.float64)
    torch.testing.assert_close(theta.softmax(-1), policy, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("setting", "tolerance"),
    [(Setting("cmdp", 0.1), 0.0005), (Setting("hinge", 0.1), 0.0002), (Setting("hinge", 0.1, weight=3.0), 0.0002)],
    ids=["cmdp", "hinge1", "hinge3"],
)
def test_bandit_reaches_the_optimum(setting: Setting, tolerance: float) -> None:
    """A weight of 1 is enough here: the multiplier is .79."""
    problem, optimum = bandit(), BANDIT["reverse_kl"][1]
    assert optimum["budget"] == setting.budget and optimum["lambda"] < setting.weight
    _, rollout = ascend(problem, setting, steps=200)
    assert value(problem, rollout) == pytest.approx(optimum["value"], abs=tolerance)
    assert rollout.totals.max() < setting.budget + 0.002


def test_bandit_hinge_below_the_multiplier_overspends() -> None:
    problem, optimum = bandit(), BANDIT["reverse_kl"][1]
    _, rollout = ascend(problem, Setting("hinge", 0.1, weight=0.5), steps=200)
    assert value(problem, rollout) > optimum["value"] + 0.02
    assert rollout.totals.max() > 0.15


@pytest.mark.parametrize(("cost", "index"), [("reverse_kl", 1), ("forward_kl", 0)])
def test_bandit_pid_finds_the_multiplier(cost: str, index: int) -> None:
    problem, pid, optimum = bandit(), Pid(), BANDIT[cost][index]
    setting = Setting("pid", optimum["budget"], cost=cost, coefficient=pid.controller.coefficient)
    policy, rollout = ascend(problem, setting, steps=600, rate=0.05, final=0.1, adapt=pid)
    assert value(problem, rollout) == pytest.approx(optimum["value"], abs=1e-6)
    assert pid.controller.coefficient == pytest.approx(optimum["lambda"], abs=1e-5)
    torch.testing.assert_close(policy, torch.tensor([optimum["policy"]], dtype=torch.float64), rtol=0, atol=1e-5)


def test_bandit_saute_has_no_way_back() -> None:
    """With an action-independent cost a student over budget gets no gradient at all; cmdp's points back."""
    problem = bandit()
    start = torch.tensor([[0.0, 0.0, 0.0, 4.0]], dtype=torch.float64)
    before = roll_out(problem, start, Setting("saute", 0.1))
    assert before.totals.max() > 1.0
    policy, _ = ascend(problem, Setting("saute", 0.1), start=start, steps=20)
    assert torch.equal(policy, start.softmax(-1))
    _, after = ascend(problem, Setting("cmdp", 0.1), start=start, steps=200)
    assert after.totals.max() < 0.102
