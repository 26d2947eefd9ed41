"""The value head of `--baseline gae`: its precision, its gradient, and the reach of a reward."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_pair import learner_of, settings

import cmdp_fast as cf
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


@pytest.mark.parametrize("bootstraps", [False, True])
def test_a_completion_that_was_cut_off_is_worth_what_the_head_says_of_its_rest(bootstraps, pair):
    """If that is wanted; one that has ended is worth nothing more, and one may be cut before the others are."""
    config = settings(pair, baseline="gae", bootstrap_truncated=bootstraps, max_new_tokens=4, micro_batch_size=2)
    learner, rows, prompts = learner_of(config)
    head = learner.method.value_head
    with torch.no_grad():
        head.linear.weight.normal_()
    constraint = learner.constraint()
    part = learner.method.collect(rows * 4, prompts * 4, constraint)
    rollout = part.rollout
    assert 2 < (~rollout.finished).sum() < len(rollout)  # more than a micro-batch of them
    row = int((~rollout.finished).nonzero()[0])
    rollout.mask[row, 2:] = False
    expected = torch.zeros(len(rollout))
    for i in (~rollout.finished).nonzero()[:, 0].tolist() if bootstraps else []:
        ids = torch.cat([rollout.prompt_ids[i][rollout.prompt_mask[i]], rollout.tokens[i][rollout.mask[i]]])
        with torch.no_grad():
            expected[i] = head(cf.last_hidden_state(learner.student, ids[None]))[0, -1]
    targets = learner.method.targets(part, constraint)
    advantage, value = objective.gae(part.reward, part.value, mask=rollout.mask, beyond=expected)
    torch.testing.assert_close(targets["advantage"], advantage, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(targets["value"], value, rtol=1e-4, atol=1e-5)
    metrics = learner.step(rows, prompts)
    assert math.isfinite(metrics["loss/value"])


def test_bootstrapping_needs_a_value_head(pair):
    with pytest.raises(InputError, match="it needs --baseline gae"):
        settings(pair, bootstrap_truncated=True)
