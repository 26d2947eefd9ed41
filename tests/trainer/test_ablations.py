"""benchmarks/ablations.py: each variant changes what it says and nothing else, and its lines are those of a study."""

from __future__ import annotations

import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from tiny_pair import learner_of, settings

from cmdp_fast import objective
from cmdp_fast.reading import completion_logits
from cmdp_fast.trainer.comparison.study.lines import read_lines
from cmdp_fast.trainer.comparison.study.plan import Situation, Study, read_study
from cmdp_fast.trainer.methods import ppo
from cmdp_fast.trainer.methods.ppo import PPO

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import ablations

GROUP = 4
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}  # float32 sums of six tokens


def made(pair, variant=PPO, **changes):
    """A method on the tiny pair, its problems and prompts, and its constraint."""
    learner, rows, prompts = learner_of(settings(pair, budget=3.0, **changes))
    rows, prompts = ([item for item in items for _ in range(GROUP)] for items in (rows, prompts))
    return variant(learner.collector, learner.clock), rows, prompts, learner.constraint()


def collected(pair, variant=PPO, **changes):
    """The method, completions of the same random numbers whatever it is, some of them over budget, and the constraint.
    Each completion is worth something."""
    method, rows, prompts, constraint = made(pair, variant, **changes)
    method.collector.rewards = {"length": lambda completions, **_: [1.0 + len(text) for text in completions]}
    method.collector.judging = "length"
    torch.manual_seed(0)
    experience = method.collect(rows, prompts, constraint)
    assert 0 < experience.trace.violated.any(1).float().mean() < 1
    return method, experience, constraint


def test_without_the_direct_term_only_the_score_is_left(pair):
    whole, experience, constraint = collected(pair)
    part = ablations.NoDirectTerm(whole.collector, whole.clock)
    ours, theirs = (method.targets(experience, constraint) for method in (part, whole))
    assert theirs["direct"].any() and not ours["direct"].any()
    torch.testing.assert_close(ours["advantage"], theirs["advantage"], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["cmdp", "hinge"])
def test_without_future_costs_the_score_is_the_tasks_return(kind, pair):
    method, experience, constraint = collected(pair, ablations.NoFutureCost, kind=kind)
    mask, reward = experience.rollout.mask, experience.last_reward
    earned = torch.where(experience.trace.violated, 0.0, reward) if kind == "cmdp" else reward
    returns = earned.flip(1).cumsum(1).flip(1)
    expected = objective.position_rloo(returns, GROUP, mask)
    targets, whole = (m.targets(experience, constraint) for m in (method, PPO(method.collector, method.clock)))
    torch.testing.assert_close(targets["advantage"], expected, **TOLERANCE)
    assert (whole["advantage"] - expected).abs().max() > 0.1  # which has the costs
    torch.testing.assert_close(targets["direct"], whole["direct"], rtol=0, atol=0)


def test_the_gate_is_all_that_cmdp_has_beyond_hinge_with_a_penalty(pair):
    _, gated, _ = collected(pair, kind="cmdp", penalty=0.7)
    _, ungated, _ = collected(pair, ablations.PenaltyWithoutGate, kind="hinge", penalty=0.7)
    assert torch.equal(gated.rollout.tokens, ungated.rollout.tokens)
    beyond = torch.where(gated.trace.violated, gated.last_reward, 0.0)
    assert beyond.any()
    torch.testing.assert_close(ungated.reward, gated.reward + beyond, **TOLERANCE)


def test_a_penalty_at_every_token_is_paid_as_often_as_one_violates(pair):
    _, once, _ = collected(pair, penalty=0.7)
    _, often, _ = collected(pair, ablations.PenaltyAtEveryToken, penalty=0.7)
    violated = once.trace.violated & once.rollout.mask
    more = 0.7 * (violated.sum(1) - 1).clamp(min=0)
    assert more.any()
    torch.testing.assert_close(often.reward.sum(1), once.reward.sum(1) - more, **TOLERANCE)


def test_the_logarithm_of_the_excess_is_charged_and_differentiated(pair):
    whole, experience, constraint = collected(pair, kind="hinge", discrepancy_weight=0.5)
    part, logarithmic, _ = collected(pair, ablations.LogExcess, kind="hinge", discrepancy_weight=0.5)
    mask = experience.rollout.mask
    excess = (torch.where(mask, experience.cost(constraint), 0.0).sum(1) - 3.0).clamp(min=0.0)
    expected = experience.task_reward - 0.5 * excess.log1p()
    torch.testing.assert_close(logarithmic.reward.sum(1), expected, **TOLERANCE)
    slope = 0.5 / (1.0 + excess[:, None]) * (mask & (excess[:, None] > 0))
    torch.testing.assert_close(part.targets(logarithmic, constraint)["direct"], slope, **TOLERANCE)
    assert (whole.targets(experience, constraint)["direct"] - slope).abs().max() > 0.1


def test_stale_completions_are_the_students_of_then(pair):
    """They report the log-probabilities of then, are scored by the student of now, and leave its weights alone."""
    method, rows, prompts, constraint = made(pair, ablations.stale(2))
    policies, drawn = [], []
    for _ in range(4):
        with torch.no_grad():
            for parameter in method.student.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        policies.append({name: value.clone() for name, value in method.student.state_dict().items()})
        drawn.append(method.collect(rows, prompts, constraint))
        assert all(torch.equal(value, policies[-1][name]) for name, value in method.student.state_dict().items())
    for now, experience in enumerate(drawn):
        rollout = experience.rollout
        of_then = logprobs(method.student, policies[max(0, now - 2)], rollout)
        torch.testing.assert_close(rollout.sampler_logprob, of_then, **TOLERANCE)
        of_now = logprobs(method.student, policies[now], rollout)
        torch.testing.assert_close(experience.stats.logprob, of_now, **TOLERANCE)
        assert bool((of_now - of_then).abs().max() > 0.01) == (now > 0)


@torch.no_grad()
def logprobs(student, policy, rollout):
    student.load_state_dict(policy)
    each = completion_logits(student, rollout).log_softmax(-1).gather(2, rollout.tokens[..., None])[..., 0]
    return torch.where(rollout.mask, each, 0.0)


def test_every_variant_is_a_training_of_its_own():
    """Of which the settings alone would not tell: those of the same candidate are the same."""
    study = replace(read_study("ablations"), seeds=(3,))
    planned = ablations.plan_of(study, ablations.VARIANTS, Path("runs"))
    assert len(planned) == len(ablations.VARIANTS) * len(study.situations)
    assert len({training.config.name for _, training in planned}) == len(planned)
    for variant, training in planned:
        line, *references = (wanted.line for wanted in training.wanted)
        assert len(references) == (2 if variant is ablations.VARIANTS[0] else 0)
        assert (line.training, line.method, line.seed) == (training.config.name, variant.name, training.config.seed)
        training.config.validate()


def test_a_variant_is_trained_in_its_own_process(pair, tmp_path):
    """Its class is in place there and not here, and what it raises is the failure of the training."""

    class Failing(PPO):
        def targets(self, experience, constraint):
            raise RuntimeError(f"targets of {type(self).__name__}")

    config = settings(pair, output_dir=str(tmp_path), name="run", eval_prompts=1)
    variant = ablations.Variant("failing", "cmdp", Failing)
    assert ablations.run(variant, config, tmp_path / "log") == "exit code 1: RuntimeError: targets of Failing"
    assert ppo.PPO is PPO


def test_the_lines_are_those_of_a_study_and_what_has_one_is_not_run_again(pair, tmp_path, monkeypatch):
    recipe = tmp_path / "tiny.toml"
    config = settings(pair, eval_prompts=2, eval_generations=2)
    changed = {f.name: value for f in fields(config) if (value := getattr(config, f.name)) != f.default}
    recipe.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in changed.items()))
    study = Study("tiny", str(recipe), (0,), 0.95, {}, (Situation("only"),), (), (), "# the study's own head\n")
    stale = ablations.Variant("stale", "cmdp", ablations.stale(1), {"sampler_correction": "sequence"})
    variants = (ablations.Variant("no direct term", "cmdp", ablations.NoDirectTerm), stale)
    study = ablations.study_of(study, variants, "tiny-variants")
    assert ablations.run_all(study, variants, tmp_path / "out", ["python", "it.py"])
    lines = read_lines(tmp_path / "out" / "runs.jsonl")
    assert [line.method for line in lines] == ["no direct term", "teacher", "student before", "stale"]
    assert [line.candidate for line in lines] == ["cmdp", "", "", "cmdp"]
    page = (tmp_path / "out" / "README.md").read_text()
    assert "no direct term" in page and "the study's own head" in page
    monkeypatch.setattr(ablations, "run", lambda *_: pytest.fail("run again"))
    assert ablations.run_all(study, variants, tmp_path / "out", ["python", "it.py"])
    assert read_lines(tmp_path / "out" / "runs.jsonl") == lines
