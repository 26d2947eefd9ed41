"""The figures of an evaluation: against their definitions, in any batching, and by `cmdp-fast evaluate`."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from tiny_pair import arguments, arguments_for, learner_of, settings

from cmdp_fast.cli import main
from cmdp_fast.trainer import evaluate as evaluate_module
from cmdp_fast.trainer.evaluate import FIGURES, evaluate
from cmdp_fast.trainer.evaluate_student import EvaluateConfig
from cmdp_fast.trainer.records.clock import Clock
from cmdp_fast.trainer.tasks import data


@pytest.fixture
def collector(pair):
    """A collector whose batches are smaller than an evaluation."""
    config = settings(
        pair, holdout_fraction=0.9, prefix_budget=4.0, step_verifier="equations", correct_at=0.5, num_generations=3
    )
    learner, _, _ = learner_of(config, random=lambda completions, **_: [len(c) % 2 for c in completions])
    learner.collector.step_verifier = lambda prompt, completion, **_: None if "A" in completion else len(completion) > 4
    learner.collector.config = dataclasses.replace(config, num_generations=5)
    return learner.collector


def test_figures_are_those_of_all_completions_together(collector):
    """Against each sample's own values; in a batch and a half, so that means of batches would differ."""
    rows = data.load_problems(collector.config).held_out
    figures, samples = evaluate(collector, collector.student, rows, Clock())
    n = len(samples)
    assert figures["examples"] == n == 3 * len(rows) and n % collector.config.batch_size
    # no judge in a process of its own, no sampler, costs that are exact
    absent = {"unjudged", "sampling_logp_difference", "certified"}
    assert figures.keys() == {*FIGURES, "examples"} - absent

    def mean(name: str) -> float:
        return sum(sample[name] for sample in samples) / n

    assert figures["accuracy"] == pytest.approx(mean("correct"))
    assert figures["constraint_satisfaction"] == pytest.approx(mean("feasible"))
    both = sum(s["correct"] and s["feasible"] for s in samples) / n
    assert figures["correct_and_feasible"] == pytest.approx(both)
    assert figures["mean_cumulative_kl"] == pytest.approx(mean("cumulative_kl"), rel=1e-5)
    assert figures["mean_length"] == pytest.approx(mean("length"))
    assert figures["truncated"] == pytest.approx(1 - mean("finished"))
    assert figures["reward"] == pytest.approx(mean("reward"))
    excess = [max(0.0, s["cumulative"] - collector.config.budget) for s in samples]
    assert figures["mean_excess"] == pytest.approx(sum(excess) / n, rel=1e-4)
    worst = sorted((s["cumulative_kl"] for s in samples), reverse=True)
    whole = int(0.1 * n)
    tail = (sum(worst[:whole]) + (0.1 * n - whole) * worst[whole]) / (0.1 * n)
    assert figures["cvar_cumulative_kl"] == pytest.approx(tail, rel=1e-5)
    checked = [s["sound"] for s in samples if s["sound"] is not None]
    assert 0 < len(checked) < n
    assert figures["reasoning_success"] == pytest.approx(sum(checked) / len(checked))
    assert figures["reasoning_checked"] == pytest.approx(len(checked) / n)


def test_prefix_satisfaction_is_of_the_teacher_s_likelihood(collector, monkeypatch):
    parts = []
    monkeypatch.setattr(
        collector, "collect", lambda *a, **k: parts.append(type(collector).collect(collector, *a, **k)) or parts[-1]
    )
    figures, samples = evaluate(collector, collector.student, data.load_problems(collector.config).held_out, Clock())
    good = 0
    for part in parts:
        for row, mask in zip(-part.stats.teacher_logprob, part.rollout.mask, strict=True):
            likelihood = row[mask].double()
            means = likelihood.cumsum(0) / torch.arange(1, len(likelihood) + 1)
            good += bool((means <= collector.config.prefix_budget).all())
    assert 0 < good < len(samples)
    assert figures["prefix_satisfaction"] == pytest.approx(good / len(samples))


def test_without_a_teacher_nothing_is_compared(collector):
    rows = data.load_problems(collector.config).held_out
    whole, samples = evaluate(collector, collector.student, rows, Clock())
    collector.teacher = None
    alone, same = evaluate(collector, collector.student, rows, Clock())
    left = {"accuracy", "reasoning_success", "reasoning_checked", "reward", "distinct_2", "repetition_4"}
    left |= {"mean_length", "truncated", "examples"}
    assert alone == {name: whole[name] for name in left}
    assert [s["completion"] for s in same] == [s["completion"] for s in samples]
    assert "feasible" not in same[0] and "cumulative_kl" not in same[0]


def command(pair, **changes) -> list[str]:
    return arguments_for(EvaluateConfig, "evaluate", pair, **changes)


def test_the_command_finds_what_the_run_reported(pair, tmp_path, capsys):
    assert main(arguments(pair, tmp_path, prefix_budget=1.0)) == 0
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    student, file = str(tmp_path / "r" / "student"), tmp_path / "figures.json"
    again = command(pair, student=student, json=file, prefix_budget=1.0)
    assert main([*again, "--held-out"]) == 0
    found = json.loads(file.read_text())
    several = {name: found.pop(name) for name in ("mean@3", "pass@2", "pass@3")}
    assert several["mean@3"] == pytest.approx(found["accuracy"]) and several["pass@2"] <= several["pass@3"]
    assert found == summary["student_after"] | {
        "student": student,
        "teacher": pair["teacher"],
        "recipe": "quickstart",
        "budget": 2.0,
    }
    output = capsys.readouterr().out
    assert "constraint satisfaction" in output and f"{found['mean_cumulative_kl']:.4g}" in output

    assert main([*command(pair, student=student, teacher="", json=file), "--held-out"]) == 0
    alone = json.loads(file.read_text())
    assert alone["teacher"] is None and alone["accuracy"] == found["accuracy"]
    assert not any("cumulative" in name or "constraint" in name for name in alone)


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(student=""), "--student is missing"),
        (dict(student="./no/such/model"), "--student ./no/such/model"),
        (dict(json="no/such/folder/x.json"), "--json no/such/folder/x.json: there is no folder"),
        (dict(budget=0), "--budget must be a positive number"),
        (dict(step_verifier="sums"), "--step-verifier sums"),
    ],
)
def test_refused(changes, expected, pair, tmp_path, capsys):
    assert main(command(pair, **changes)) == 2
    error = capsys.readouterr().err
    assert error.startswith("cmdp-fast: error: ") and error.count("\n") == 1 and expected in error


def test_first_completions_of_the_first_problems_have_their_tokens(collector, monkeypatch):
    """Three completions of each problem, in batches that begin in the middle of one."""
    monkeypatch.setattr(evaluate_module, "DETAILED", 4)
    collector.config = dataclasses.replace(collector.config, prompts_per_step=2, num_generations=4)
    rows = data.load_problems(collector.config).held_out
    assert len(rows) > 5 and collector.config.batch_size % 3
    _, samples = evaluate(collector, collector.student, rows, Clock(), detailed=True)
    assert [i for i, sample in enumerate(samples) if "tokens" in sample] == [0, 3, 6, 9]
    for sample in samples[:10:3]:
        assert "".join(sample["tokens"]) == sample["completion"]
        spent = torch.tensor(sample["costs"]).cumsum(0)
        assert len(spent) == len(sample["tokens"]) == sample["length"]
        assert float(spent[-1]) == pytest.approx(sample["cumulative"], rel=1e-3)
        over = (spent > collector.config.budget).nonzero().flatten().tolist()
        assert sample["crossing"] == (over[0] if over else None)
    assert any(sample["crossing"] is not None for sample in samples[:10:3])
    few = samples[0]["length"] + samples[3]["length"]
    for most, kept in ((few, [0, 3]), (few - 1, [0])):
        monkeypatch.setattr(evaluate_module, "TOKENS", most)
        _, again = evaluate(collector, collector.student, rows, Clock(), detailed=True)
        assert [i for i, sample in enumerate(again) if "tokens" in sample] == kept
    monkeypatch.undo()
    assert not any("tokens" in sample for sample in evaluate(collector, collector.student, rows, Clock())[1])
    collector.teacher = None
    _, alone = evaluate(collector, collector.student, rows, Clock(), detailed=True)
    assert not any("tokens" in sample for sample in alone)


def test_perplexity_is_the_teacher_s_of_what_was_sampled(collector, monkeypatch):
    parts = []
    monkeypatch.setattr(
        collector, "collect", lambda *a, **k: parts.append(type(collector).collect(collector, *a, **k)) or parts[-1]
    )
    figures, _ = evaluate(collector, collector.student, data.load_problems(collector.config).held_out, Clock())
    likelihood = torch.cat([part.stats.teacher_logprob[part.rollout.mask] for part in parts]).double()
    assert figures["teacher_perplexity"] == pytest.approx(math.exp(-float(likelihood.mean())), rel=1e-5)
