"""The multiplier of `pid` in a step: what it is compared with, and when."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tiny_pair import learner_of, settings

import cmdp_fast as cf
from cmdp_fast.errors import InputError
from cmdp_fast.objective import PIDController
from cmdp_fast.trainer.experience import Experience
from cmdp_fast.trainer.step import Learner

GAINS = (0.1, 0.02, 0.05)


def learner_with(pair, **changes) -> tuple[Learner, list, list]:
    return learner_of(settings(pair, kind="pid", coefficient=0.3, pid_gains=GAINS, **changes))


def controller() -> PIDController:
    kp, ki, kd = GAINS
    return PIDController(kp=kp, ki=ki, kd=kd, initial_integral=0.3)


@pytest.mark.parametrize("budget", [0.5, 50.0])
def test_lambda_follows_from_the_completions_that_it_is_used_for(budget, pair):
    learner, rows, prompts = learner_with(pair, budget=budget)
    by_hand = controller()
    for _ in range(2):
        metrics = learner.step(rows, prompts)
        expected = by_hand.update(metrics["cmdp/mean_cumulative"], budget)
        assert (expected > 0.3) == (budget == 0.5)
        assert metrics["cmdp/lambda"] == pytest.approx(expected, rel=1e-6, abs=1e-9)
        price = metrics["cmdp/lambda"] * metrics["cmdp/mean_cumulative"]
        assert metrics["cmdp/modified_reward"] == pytest.approx(metrics["reward"] - price, rel=1e-5, abs=1e-6)


def test_a_budget_per_token_is_compared_as_the_budget_of_whole_completions(pair):
    """A completion costs more than a nat, of which it has two for each token: every one is within its budget."""
    learner, rows, prompts = learner_with(pair, budget=2.0, budget_per_token=True)
    by_hand, lambdas = controller(), []
    for _ in range(2):
        metrics = learner.step(rows, prompts)
        assert metrics["cmdp/mean_cumulative"] > 2.0 and metrics["cmdp/constraint_satisfaction"] == 1.0
        expected = by_hand.update(metrics["cmdp/mean_cumulative"], 2.0 * metrics["completions/mean_length"])
        assert metrics["cmdp/lambda"] == pytest.approx(expected, rel=1e-6)
        lambdas.append(expected)
    assert 0.3 > lambdas[0] > lambdas[1]


def collected(pair, learner_and_rows: tuple[Learner, list, list], coefficient: float) -> tuple[Learner, Experience]:
    learner, rows, prompts = learner_and_rows
    rows, prompts = ([item for item in items for _ in range(4)] for items in (rows, prompts))
    constraint = dataclasses.replace(learner.constraint(), coefficient=coefficient)
    return learner, learner.method.collect(rows, prompts, constraint)


@pytest.mark.parametrize("cost", ["reverse_kl", "jsd", "k1"])
def test_the_reward_is_that_of_a_scoring_with_this_lambda(cost, pair):
    """Also for the cost that is no statistic, and for a clamped one."""
    changes = {"cost": cost, "cost_clamp": 0.4 if cost == "k1" else 0.0, "budget": 0.2}
    learner, experience = collected(pair, learner_with(pair, **changes), coefficient=0.3)
    constraint = learner.price(experience, learner.constraint())
    assert constraint.coefficient == learner.pid.coefficient != 0.3
    targets = learner.method.targets(experience, constraint)
    _, same = collected(pair, learner_with(pair, **changes), coefficient=constraint.coefficient)
    assert torch.equal(experience.rollout.tokens, same.rollout.tokens)
    torch.testing.assert_close(experience.reward, same.reward)
    mask = experience.rollout.mask
    direct = 0.0 if constraint.action_dependent else constraint.coefficient
    torch.testing.assert_close(targets["direct"], torch.where(mask, direct, 0.0))


def test_an_infinite_cost_is_named(pair):
    learner, experience = collected(pair, learner_with(pair), coefficient=0.3)
    cumulative = experience.trace.cumulative.clone()
    cumulative[0] = math.inf
    experience.trace = cf.BudgetTrace(cumulative, *experience.trace[1:])
    with pytest.raises(InputError, match="mean cost of the completions is inf nats"):
        learner.price(experience, learner.constraint())
    assert learner.pid.coefficient == 0.3


@pytest.mark.parametrize("gains", [(0.1, math.inf, 0.0), (math.nan, 0.1, 0.0), (0.1, 0.1)])
def test_gains_are_three_finite_numbers(gains, pair):
    with pytest.raises(InputError, match="--pid-gains must be three finite numbers, not "):
        settings(pair, kind="pid", coefficient=0.3, pid_gains=gains)
