"""The gradient from the two coefficients against finite differences of the objective itself, on the enumerated tree."""

from __future__ import annotations

import pytest
import torch
from exact import Problem, Setting, exact_loss, roll_out, tree
from torch import Tensor

# Central differences in float64: truncation h^2 f'''/6 and rounding eps f/h are both about 1e-10 for f of order one.
STEP, TOLERANCE = 1e-5, 1e-8


def student(problem: Problem, child_scale: float = 1.0) -> Tensor:
    """A random policy; with a small ``child_scale`` one that departs from the teacher at the root alone."""
    noise = torch.randn(problem.teacher.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    noise[1:] *= child_scale
    return problem.teacher.log() + noise


def analytic(problem: Problem, theta: Tensor, setting: Setting, *, score_only: bool = False) -> Tensor:
    theta = theta.clone().requires_grad_()
    exact_loss(problem, roll_out(problem, theta, setting), setting, score_only=score_only).backward()
    return -theta.grad


def numeric(problem: Problem, theta: Tensor, setting: Setting) -> Tensor:
    """d/dtheta of E[sum of modified rewards]; no trajectory may change sides of the budget within the step."""
    here = roll_out(problem, theta, setting)
    assert here.trace.remaining.abs().min() > 1e-3

    def objective(at: Tensor) -> Tensor:
        rollout = roll_out(problem, at, setting)
        assert torch.equal(rollout.trace.violated, here.trace.violated)
        return rollout.expect(rollout.reward.sum(1))

    shifts = STEP * torch.eye(theta.numel(), dtype=theta.dtype).reshape(-1, *theta.shape)
    slopes = [(objective(theta + shift) - objective(theta - shift)) / (2 * STEP) for shift in shifts]
    return torch.stack(slopes).reshape(theta.shape)


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


BASE = {"penalty": 0.5, "weight": 2.0}
SETTINGS = [
    Setting("hinge", 0.02, **BASE),
    Setting("cmdp", 0.02, **BASE),
    Setting("lagrangian", 0.02, coefficient=0.7, **BASE),
    Setting("pid", 0.02, coefficient=0.7, **BASE),
    Setting("barrier", 0.02, coefficient=0.3, **BASE),  # all trajectories outside
    Setting("barrier", 0.5, coefficient=0.3, **BASE),  # some cross at the second token, some never
    Setting("barrier", 5.0, coefficient=0.3, **BASE),  # all inside
    Setting("saute", 0.5, **BASE),
    Setting("hinge", 0.5, **BASE),
    Setting("cmdp", 0.5, **BASE),
    *(Setting(kind, 0.5, coefficient=0.3, cost="forward_kl", **BASE) for kind in ("hinge", "cmdp", "barrier")),
    *(Setting(kind, 0.35, coefficient=0.3, cost_gamma=0.5, **BASE) for kind in ("hinge", "cmdp", "barrier")),
    *(Setting(kind, 0.2, coefficient=0.3, reduction="mean", **BASE) for kind in ("hinge", "cmdp", "barrier")),
    *(
        Setting(kind, 2.0, coefficient=0.3, cost="nll", **BASE)
        for kind in ("hinge", "cmdp", "saute", "lagrangian", "barrier")
    ),
    Setting("worst_case", 1.25, cost="nll", reduction="mean", **BASE),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_matches_finite_differences(setting: Setting) -> None:
    problem = tree()
    theta = student(problem)
    expected = numeric(problem, theta, setting)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(analytic(problem, theta, setting), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["hinge", "cmdp", "barrier"])
def test_prefix_mean_that_comes_back_has_no_direct_term(kind: str) -> None:
    """v_T stays 1 after m_1 > d >= m_2, but the excess has been given back and its gradient with it."""
    problem = tree()
    theta = student(problem, child_scale=0.1)
    setting = Setting(kind, 0.09, reduction="mean", coefficient=0.3, **BASE)
    trace = roll_out(problem, theta, setting).trace
    assert trace.violated[:, -1].all() and (trace.remaining[:, -1] > 0).all()
    torch.testing.assert_close(
        analytic(problem, theta, setting), numeric(problem, theta, setting), rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("kind", ["hinge", "cmdp"])
def test_neither_term_may_be_dropped(kind: str) -> None:
    problem = tree()
    theta = student(problem)
    setting = Setting(kind, 0.02, **BASE)
    full = numeric(problem, theta, setting)
    score = analytic(problem, theta, setting, score_only=True)
    direct = analytic(problem, theta, setting) - score
    # without the long-term part an action is credited with its own task reward alone
    rollout = roll_out(problem, leaf := theta.clone().requires_grad_(), setting)
    own = torch.where(rollout.trace.violated & (kind == "cmdp"), 0.0, problem.reward)
    rollout.expect((rollout.logprob * own).sum(1)).backward()
    assert cosine(score + direct, full) > 1 - 1e-12
    assert cosine(score, full) < 0.9
    assert cosine(leaf.grad + direct, full) < 0.95
