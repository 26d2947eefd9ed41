"""A step on completions that another sampler than the student has drawn, on the tree: exact in all but the baseline.

The sampler draws each path as often as its probability says, so a mean over the step is an expectation over it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from exact import Rollout, Setting, exact_loss, roll_out, tree
from tabular import learner_of, settings, step
from torch import Tensor

from cmdp_fast.errors import InputError
from cmdp_fast.objective import PIDController
from cmdp_fast.trainer.correction import estimate_weight, weighed
from cmdp_fast.trainer.evaluate import evaluate
from cmdp_fast.trainer.experience import Experience
from cmdp_fast.trainer.records.clock import Clock
from cmdp_fast.trainer.step import Learner

COUNT = 1024
TIMES = torch.tensor([160, 64, 32, 128, 256, 128, 16, 208, 32])  # of each path among so many
HINGE = Setting("hinge", 0.35, weight=2.0)
SAMPLER = "--rollout server.py:draw"


def student() -> Tensor:
    return tree().teacher.log() + 0.8 * torch.randn(4, 3, generator=torch.Generator().manual_seed(7)).double()


def sampler_logprob() -> Tensor:
    """Of each token of each path [9, 2], from how often the paths are drawn."""
    times = TIMES.double().reshape(3, 3)
    root, child = times.sum(1) / COUNT, times / times.sum(1, keepdim=True)
    return torch.stack([root[:, None].expand(3, 3).flatten(), child.flatten()], 1).log()


def draw(prompts: list[list[int]], **_: Any) -> dict[str, Any]:
    paths = torch.arange(9).repeat_interleave(TIMES)
    tokens, logprob = tree().tokens[paths], sampler_logprob()[paths]
    return {"completion_ids": tokens.tolist(), "logprobs": logprob.tolist()}


def learner_on_samples(setting: Setting, rollout: Any = draw, **changes: Any) -> Learner:
    options = {"rollout": "server.py:draw", "sampler_clip": 1e6, "epochs": 1, "learning_rate": 1e-9} | changes
    learner = learner_of(tree(), settings(setting, num_generations=COUNT, **options), student())
    learner.collector.rollout = rollout
    return learner


def collected(learner: Learner) -> Experience:
    start = learner.student.config.bos_token_id
    rows = [{"prompt": "<start>"}] * COUNT
    return learner.method.collect(rows, [[start]] * COUNT, learner.constraint())


def expectations(setting: Setting = HINGE) -> tuple[Rollout, Tensor]:
    """(what the student makes of every path, the probability of each under the sampler)."""
    return roll_out(tree(), student(), setting), TIMES / COUNT


# ------------------------------------------------------------------------------------- estimates


@pytest.mark.parametrize("mode", ["auto", "token", "sequence", "off"])
def test_figures_of_the_budget_are_expectations_over_the_student(mode):
    """In both modes, and as before over the sampler without a correction."""
    metrics = step(learner_on_samples(HINGE, sampler_correction=mode))
    rollout, drawn = expectations()
    weight = drawn.double() if mode == "off" else rollout.probability
    expected = {
        "mean_cumulative": weight @ rollout.totals,
        "constraint_satisfaction": weight @ (rollout.totals <= HINGE.budget).double(),
        "modified_reward": weight @ rollout.reward.sum(1),
        "cumulative_kl": weight @ rollout.totals,
    }
    for name, value in expected.items():
        assert metrics[f"cmdp/{name}"] == pytest.approx(value.item(), rel=1e-5), name
    drawn_reward = (drawn.double() @ tree().reward.sum(1)).item()
    assert metrics["reward"] == pytest.approx(drawn_reward, rel=1e-5)  # TRL's name: of the completions as they are
    off = (rollout.logprob.detach() - sampler_logprob()).abs()
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(off.max().item(), rel=1e-5)
    ratio = rollout.probability / drawn
    names = {name.rpartition("/")[2] for name in metrics if name.startswith("sampling/importance")}
    assert names == (set() if mode == "off" else {"min", "mean", "max", "clipped_ratio"})
    if mode != "off":
        effective = 1.0 / (drawn.double() @ ratio.square())  # the mean weight is 1
        assert metrics["sampling/effective_sample_ratio"] == pytest.approx(effective.item(), rel=1e-5)
        assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, rel=1e-5)
    assert (metrics.get("sampling/importance_sampling_ratio/max") == pytest.approx(ratio.max().item(), rel=1e-5)) == (
        mode == "sequence"
    )


@pytest.mark.parametrize("mode", ["token", "sequence", "off"])
def test_pid_sees_the_cost_of_the_student(mode):
    setting = Setting("pid", 0.35, coefficient=0.1)
    learner = learner_on_samples(setting, sampler_correction=mode)
    metrics = step(learner)
    rollout, drawn = expectations(setting)
    cost = (drawn.double() if mode == "off" else rollout.probability) @ rollout.totals
    expected = PIDController(kp=1.0, ki=0.1, kd=0.0, initial_integral=0.1).update(cost.item(), 0.35)
    assert metrics["cmdp/lambda"] == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_says_what_the_sampler_drew():
    """It asks for what this policy does where it is served: only the step corrects."""
    learner = learner_on_samples(HINGE, eval_generations=COUNT)
    figures, _ = evaluate(learner.collector, learner.student, [{"prompt": "<start>"}], Clock())
    rollout, drawn = expectations()
    assert figures["mean_cumulative"] == pytest.approx((drawn.double() @ rollout.totals).item(), rel=1e-5)
    off = (rollout.logprob.detach() - sampler_logprob()).abs().mean(1)
    assert figures["sampling_logp_difference"] == pytest.approx((drawn.double() @ off).item(), rel=1e-5)


# ------------------------------------------------------------------------------------- the gradient


def gradient(learner: Learner) -> Tensor:
    """That of one step's loss, over all completions; the losses here divide by them, or by tokens that are two each."""
    experience, constraint, found = collected(learner), learner.constraint(), []
    learner.scheduler.step = lambda: None
    learner.descend = lambda: found.append(learner.student.rows.weight.grad.double().clone()) or {}
    learner.config = dataclasses.replace(learner.config, minibatch_size=COUNT)
    learner.update(experience, learner.targets(experience, constraint), constraint)
    return found[0]


def test_the_gradient_of_completions_is_that_of_the_student():
    """Both terms; the baseline is the mean of the others, whose covariance with a draw of fixed proportions is 1/n."""
    theta = student().requires_grad_()
    exact_loss(tree(), roll_out(tree(), theta, HINGE), HINGE).backward()
    found = {
        mode: gradient(learner_on_samples(HINGE, sampler_correction=mode, baseline="rloo"))
        for mode in ("sequence", "token", "off")
    }
    off = {mode: ((each - theta.grad).norm() / theta.grad.norm()).item() for mode, each in found.items()}
    assert off["sequence"] < 0.01 < 0.05 < off["token"] < off["off"], off


@pytest.mark.parametrize("mode", ["token", "sequence"])
def test_weights_of_the_terms(mode):
    """A token's weight is of the score alone, a completion's of what follows from the states as well."""
    learner = learner_on_samples(HINGE, sampler_correction=mode, sampler_clip=1.5)
    experience, constraint = collected(learner), learner.constraint()
    plain, weighed = learner.method.targets(experience, constraint), learner.targets(experience, constraint)
    ratio = expectations()[0].logprob.detach() - sampler_logprob()
    ratio = (ratio if mode == "token" else ratio.sum(1, keepdim=True)).exp().clamp(max=1.5)
    weight = ratio.float()[torch.arange(9).repeat_interleave(TIMES)]
    torch.testing.assert_close(weighed["advantage"], weight * plain["advantage"])
    torch.testing.assert_close(weighed["direct"], plain["direct"] * (weight if mode == "sequence" else 1.0))


@pytest.mark.parametrize("mode", ["token", "sequence"])
def test_gkd_weighs_completions_and_no_tokens(mode):
    """Its divergence is a function of the state."""
    changes = {"algorithm": "gkd", "jsd_beta": 1.0, "sampler_correction": mode}
    theta = student().requires_grad_()
    rollout, drawn = roll_out(tree(), theta, HINGE), TIMES / COUNT
    weight = rollout.probability if mode == "sequence" else drawn.double()
    ((weight @ rollout.cost.sum(1)) / 2).backward()
    torch.testing.assert_close(gradient(learner_on_samples(HINGE, **changes)), theta.grad, rtol=1e-4, atol=1e-6)


def test_minillm_weighs_both_parts():
    learner = learner_on_samples(HINGE, algorithm="minillm", teacher_mix=0.0, sampler_correction="sequence")
    experience, constraint = collected(learner), learner.constraint()
    plain, weighed = learner.method.targets(experience, constraint), learner.targets(experience, constraint)
    weight = experience.sampler_log_ratio.sum(1, keepdim=True).exp()
    for name in ("advantage", "direct"):
        torch.testing.assert_close(weighed[name], weight * plain[name])
    torch.testing.assert_close(weighed["behaviour"], plain["behaviour"])


# ------------------------------------------------------------------------------------- what cannot be corrected


def test_weights_that_were_asked_for_need_log_probabilities(caplog):
    def silent(**given: Any) -> dict[str, Any]:
        return draw(**given) | {"logprobs": None}

    with pytest.raises(InputError, match=f"^--sampler-correction token needs the log-probabilities .*{SAMPLER}"):
        step(learner_on_samples(HINGE, silent, sampler_correction="token"))
    learner = learner_on_samples(HINGE, silent)
    metrics = step(learner)
    step(learner)
    [told] = [record.getMessage() for record in caplog.records if "logprobs" in record.getMessage()]
    assert told.startswith(f"{SAMPLER} returned completions without logprobs: they are taken for the student's")
    rollout, drawn = expectations()
    assert metrics["cmdp/mean_cumulative"] == pytest.approx((drawn.double() @ rollout.totals).item(), rel=1e-5)
    assert not [name for name in metrics if name.startswith("sampling/")]


def test_completions_that_the_student_excludes_count_for_nothing():
    """Of some the weight is 0; where it is that of all, nothing is known of the student."""
    learner = learner_on_samples(HINGE)
    with torch.no_grad():
        learner.student.rows.weight[0, 0] = -1e4
    metrics = step(learner)
    assert math.isfinite(metrics["loss"]) and metrics["sampling/importance_sampling_ratio/min"] == 0.0
    ratio = torch.tensor([[0.0, -math.inf], [0.3, 0.3], [0.0, -math.inf]])
    assert estimate_weight(ratio, learner.config).tolist() == [0.0, 1.0, 0.0]
    targets = {"advantage": torch.tensor([[1.0, math.inf]] * 3)}
    assert weighed(targets, ratio, learner.config)["advantage"][0].tolist() == [1.0, 0.0]
    with pytest.raises(InputError, match=f"^none of the 2 completions that {SAMPLER} drew is possible"):
        estimate_weight(ratio[::2], learner.config)
