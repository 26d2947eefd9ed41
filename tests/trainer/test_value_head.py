"""The value head of `--baseline gae`: its precision, its gradient, and the reach of a reward."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_pair import learner_of, settings

from cmdp_fast import objective
from cmdp_fast.errors import InputError
from cmdp_fast.trainer.settings.config import TrainConfig


def test_it_computes_in_float32_under_autocast(pair):
    learner, rows, prompts = learner_of(settings(pair, baseline="gae", mixed_precision="bf16"))
    head = learner.method.value_head
    with torch.no_grad():
        head.linear.weight.normal_()
        head.linear.bias.fill_(300.0)  # to which bfloat16 adds nothing below 1
    part = learner.method.collect(rows, prompts, learner.constraint())
    hidden = learner.collector.outputs(learner.student, part.rollout)
    exact = hidden.double() @ head.linear.weight[0].double() + 300.0
    for value in (part.value, head(hidden).detach()):  # as it scores, and as it learns
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double()[part.rollout.mask], exact[part.rollout.mask], rtol=1e-6, atol=0)


def test_its_gradient_is_cut_by_itself(pair):
    """Returns of hundreds make a gradient that is orders of magnitude above the bound; the student's is its own."""
    config = settings(pair, baseline="gae", budget=1e3, epochs=1, minibatch_size=12, max_grad_norm=0.25)
    learner, rows, prompts = learner_of(config, far=lambda completions, **_: [300.0] * len(completions))
    step, seen = learner.optimizer.step, {}

    def looked_at() -> None:
        for name, model in (("student", learner.student), ("head", learner.method.value_head)):
            seen[name] = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        step()

    learner.optimizer.step = looked_at
    metrics = learner.step(rows, prompts)
    assert metrics["value/grad_norm"] > 100 and metrics["grad_norm"] > 0.25
    assert seen == pytest.approx({"student": 0.25, "head": 0.25}, rel=1e-4)


def test_a_gradient_of_the_head_that_is_not_finite_takes_no_step(pair):
    learner, rows, prompts = learner_of(settings(pair, baseline="gae"))
    before = [p.detach().clone() for p in learner.student.parameters()]
    learner.method.value_head.linear.bias.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(InputError, match="the gradient is not finite"):
        learner.step(rows, prompts)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.student.parameters(), strict=True))


def test_a_reward_reaches_the_first_of_a_thousand_tokens():
    """As it is, with a head that has learned nothing yet, by the settings' default and by the function's."""
    reward = torch.zeros(1, 1000)
    reward[0, -1] = 1.0
    for options in ({}, {"lam": TrainConfig().gae_lambda, "gamma": TrainConfig().gamma}):
        advantage, target = objective.gae(reward, torch.zeros(1, 1000), **options)
        assert advantage[0, 0] == target[0, 0] == 1.0
