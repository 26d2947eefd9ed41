"""Sampled PPO on problems with a known optimum: its gradient, and where each method ends (tabular.py).

What a run ends with is evaluated exactly, over all paths; what is random is where it ends. On the tree, the tolerances
of cmdp, hinge, lagrangian and pid are two to three times the largest deviation that ten seeds of the same run showed
(`test_the_ends_of_several_seeds` repeats some of them).
"""

from __future__ import annotations

import pytest
import torch
from exact import Problem, Rollout, Setting, bandit, exact_loss, roll_out, tree, vectors
from tabular import collapsed, learner_of, methods, settings, step, table, train
from torch import Tensor

from cmdp_fast.trainer.experience import Completions
from cmdp_fast.trainer.step import Learner

TREE = vectors("tree")
BUDGET = TREE["budget"]
METHODS = methods("tree")


def accounts(problem: Problem, logits: Tensor, budget: float = BUDGET) -> tuple[Rollout, float]:
    """Reverse KL of every path, summed, and the expected reward."""
    rollout = roll_out(problem, logits, Setting("hinge", budget))
    return rollout, rollout.expect(problem.reward.sum(1)).item()


def student() -> Tensor:
    """Some logits whose paths are partly within and partly over `GRADIENTS`' budget."""
    return tree().teacher.log() + 0.8 * torch.randn(4, 3, generator=torch.Generator().manual_seed(7)).double()


# --------------------------------------------------------------------------------------------------------------
# The model


def sampled(problem: Problem, learner: Learner, count: int) -> Completions:
    rows, start = [{"prompt": "<start>"}] * count, learner.student.config.bos_token_id
    return learner.collector.complete(learner.student, rows, [[start]] * count, learner.clock)


def test_the_table_is_sampled_and_scored_as_it_says():
    """Paths come with their probability, and the trainer's account of each is exact.py's."""
    problem, count = tree(), 4000
    learner = learner_of(problem, settings(METHODS["hinge"]), student())
    completions = sampled(problem, learner, count)
    experience = learner.collector.score(completions, learner.student, learner.constraint(), learner.clock)
    path = 3 * completions.rollout.tokens[:, 0] + completions.rollout.tokens[:, 1]
    expected, _ = accounts(problem, student())
    for ours, exact in (
        (completions.task_reward, problem.reward.sum(1)),
        (experience.trace.cumulative, expected.trace.cumulative),
        (experience.stats.logprob, expected.logprob),
    ):
        torch.testing.assert_close(ours, exact[path].float())  # the trainer's numbers are float32
    deviation = (count * expected.probability * (1 - expected.probability)).sqrt()  # counts are binomial
    assert ((torch.bincount(path, minlength=9) - count * expected.probability).abs() < 5 * deviation).all()


def test_the_table_starts_again_at_a_start():
    model = table(tree(), student())
    logits = model(torch.tensor([[3, 3, 1, 2], [3, 1, 2, 3]])).logits  # padded on the left, and an episode's end
    torch.testing.assert_close(logits.double(), model.logits[torch.tensor([[0, 0, 2, 0], [0, 2, 0, 0]])])


# --------------------------------------------------------------------------------------------------------------
# The gradient

GRADIENTS = [
    Setting("cmdp", 0.35, penalty=0.5, weight=2.0),
    Setting("hinge", 0.35, weight=2.0),
    Setting("lagrangian", 0.35, coefficient=1.0),
]


@pytest.fixture(scope="module")
def batches() -> list[Completions]:
    problem = tree()
    learner = learner_of(problem, settings(METHODS["hinge"]), student())
    return [sampled(problem, learner, 4096) for _ in range(24)]


@pytest.mark.parametrize("baseline", ["rloo", "position_rloo"])
@pytest.mark.parametrize("setting", GRADIENTS, ids=lambda setting: setting.kind)
def test_the_sampled_gradient_is_the_exact_one_on_average(setting, baseline, batches):
    """Each batch gives an independent, unbiased estimate, so their spread says how far their mean may be off."""
    problem = tree()
    learner = learner_of(problem, settings(setting, num_generations=4096, baseline=baseline), student())
    estimates = []
    for completions in batches:
        constraint = learner.constraint()
        experience = learner.collector.score(completions, learner.student, constraint, learner.clock)
        loss, _, outputs = learner.method.loss(
            experience, learner.method.targets(experience, constraint), constraint, len(completions.rollout)
        )
        learner.backward(loss, outputs)
        estimates.append(learner.student.rows.weight.grad.double())
        learner.student.zero_grad()
    estimate = torch.stack(estimates)
    mean, error = estimate.mean(0), estimate.std(0) / len(estimate) ** 0.5

    exact, one_term = (exact_gradient(problem, setting, score_only=score_only) for score_only in (False, True))
    over = roll_out(problem, student(), setting).trace.violated[:, -1]
    assert over.any() and not over.all()
    assert ((mean - exact).abs() < 5 * error).all()
    assert error.norm() < 0.05 * exact.norm()
    assert ((mean - one_term).abs() > 10 * error).any()  # the error is small enough for a missing term to show


def exact_gradient(problem: Problem, setting: Setting, *, score_only: bool) -> Tensor:
    theta = student().requires_grad_()
    exact_loss(problem, roll_out(problem, theta, setting), setting, score_only=score_only).backward()
    return theta.grad


# --------------------------------------------------------------------------------------------------------------
# Where the methods end on the tree


def check_every_path(problem: Problem, logits: Tensor) -> None:
    optimum = TREE["per_trajectory_budget"]["value"]
    rollout, value = accounts(problem, logits)
    assert rollout.totals.max() < BUDGET + 0.002
    assert rollout.totals.min() > BUDGET - 0.025  # every path spends its budget
    assert optimum - 0.008 < value < optimum + 0.001


def check_on_average(problem: Problem, logits: Tensor) -> None:
    optimum = TREE["expected_budget"]
    rollout, value = accounts(problem, logits)
    assert value == pytest.approx(optimum["value"], abs=0.008)
    assert rollout.expect(rollout.totals).item() == pytest.approx(BUDGET, abs=0.02)
    totals = torch.tensor(optimum["path_totals"], dtype=torch.float64)
    torch.testing.assert_close(rollout.totals[::3], totals, rtol=0, atol=0.03)  # so path 0 is over budget


@pytest.mark.parametrize("kind", ["cmdp", "hinge"])
def test_cmdp_and_hinge_keep_every_path_within_budget(kind):
    check_every_path(tree(), train(tree(), settings(METHODS[kind])))


@pytest.mark.parametrize("kind", ["lagrangian", "pid"])
def test_lagrangian_and_pid_keep_the_budget_on_average_only(kind):
    check_on_average(tree(), train(tree(), settings(METHODS[kind])))


def test_saute_over_budget_is_stuck():
    """Every path has crossed at its first token: all returns are equal, and the penalty has no other gradient."""
    problem = tree()
    start = collapsed(problem)
    assert accounts(problem, start)[0].trace.violated.all()
    with pytest.warns(UserWarning, match="no direct gradient"):
        after = train(problem, settings(METHODS["saute"], steps=5), start)
    assert torch.equal(after, start)


def test_cmdp_over_budget_comes_back():
    check_every_path(tree(), train(tree(), settings(METHODS["cmdp"]), collapsed(tree())))


def check_worst_case(case: dict) -> None:
    problem, setting = tree(), Setting("worst_case", case["budget"], cost="nll", reduction="mean")
    rollout = roll_out(problem, train(problem, settings(setting)), setting)
    best = (problem.tokens == torch.tensor(case["best_path"])).all(1)
    assert rollout.expect(best.double()) > 0.99
    assert rollout.expect(problem.reward.sum(1)).item() == pytest.approx(case["reward"], abs=0.01)


def test_worst_case_finds_the_best_path_whose_every_prefix_fits():
    check_worst_case(TREE["worst_case_nll"][1])


# --------------------------------------------------------------------------------------------------------------
# The longer ones


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("kind", ["cmdp", "hinge", "lagrangian", "pid"])
def test_the_ends_of_several_seeds(kind, seed):
    check = check_every_path if kind in ("cmdp", "hinge") else check_on_average
    check(tree(), train(tree(), settings(METHODS[kind], seed=seed)))


@pytest.mark.slow
def test_hinge_over_budget_comes_back():
    check_every_path(tree(), train(tree(), settings(METHODS["hinge"]), collapsed(tree())))


@pytest.mark.slow
def test_worst_case_with_the_smaller_budget():
    check_worst_case(TREE["worst_case_nll"][0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:kind='saute'")
def test_saute_from_the_teacher_crosses_and_stays():
    """It climbs until every path has crossed, and then has no gradient: Adam's momentum alone carries it further."""
    problem = tree()
    learner = learner_of(problem, settings(METHODS["saute"]))
    for _ in range(learner.config.steps):
        metrics = step(learner)
    assert metrics["grad_norm"] == 0
    assert accounts(problem, learner.student.logits)[0].totals.min() > BUDGET


@pytest.mark.slow
def test_grpo_knows_no_budget():
    problem = tree()
    rollout, value = accounts(problem, train(problem, settings(METHODS["grpo"], baseline="grpo")))
    assert value > 0.99
    assert rollout.expect(rollout.totals) > 2.0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cmdp", "hinge", "lagrangian", "pid"])
def test_the_bandit(kind):
    """One token: the budget of a path and of the average are the same. Lambda has not come to rest after 100 steps."""
    problem, optimum, setting = bandit(), vectors("bandit")["reverse_kl"][1], methods("bandit")[kind]
    rollout, value = accounts(problem, train(problem, settings(setting, steps=200)), optimum["budget"])
    assert value == pytest.approx(optimum["value"], abs=0.01)
    assert rollout.totals.max().item() == pytest.approx(optimum["budget"], abs=0.01)
