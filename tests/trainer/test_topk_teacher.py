"""Runs whose teacher answers with its most likely tokens: costs are lower bounds, and a step says what is proven."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from likeliest import Likeliest
from tiny_pair import learner_of, settings, untimed

from cmdp_fast.errors import InputError
from cmdp_fast.teachers import open as teachers
from cmdp_fast.trainer.evaluate import evaluate
from cmdp_fast.trainer.material import check_asked_cost
from cmdp_fast.trainer.records.samples import samples_text


def learner_with(pair, monkeypatch, k: int, floor: bool = True, **changes):
    """A learner whose teacher is asked for its k most likely tokens."""
    own, _, _ = learner_of(settings(pair, **changes))
    likeliest = Likeliest(own.teacher, own.collector.tokenizer, "likeliest", k=k, floor=floor)
    monkeypatch.setattr("cmdp_fast.trainer.models.pair.open_teacher", lambda *_: likeliest)
    return learner_of(settings({**pair, "teacher": "vllm:http://127.0.0.1:1"}, **changes))


@pytest.mark.parametrize("logits", ["tiled", "full"])
@pytest.mark.parametrize(
    "changes", [{"cost": "forward_kl"}, {"cost": "reverse_kl"}, {"algorithm": "gkd", "jsd_beta": 0.0}], ids=str
)
def test_with_all_tokens_the_step_is_that_of_the_teacher_itself(changes, logits, pair, monkeypatch):
    """Up to the rounding of log-probabilities that were sent in float32; and what is within the budget is proven."""
    own, rows, prompts = learner_of(settings(pair, logits=logits, **changes))
    expected = untimed(own.step(rows, prompts))
    columns = own.collector.sampling.vocab_size
    learner, rows, prompts = learner_with(pair, monkeypatch, columns, logits=logits, **changes)
    found = untimed(learner.step(rows, prompts))
    unknown = {"cmdp/cumulative_k1", "cmdp/cumulative_k3"}
    assert "cmdp/teacher_perplexity" not in found  # which needs the log-probability of what was sampled
    for name in expected.keys() - unknown - {"cmdp/teacher_perplexity"}:
        assert found[name] == pytest.approx(expected[name], rel=2e-4, abs=2e-4), name
    assert found["cmdp/certified"] + found["cmdp/refuted"] == pytest.approx(1.0)
    assert found["cmdp/certified"] == pytest.approx(expected["cmdp/constraint_satisfaction"])


def test_with_fewer_tokens_the_cost_is_less_and_less_is_proven(pair, monkeypatch):
    costs, proven, exact = [], [], None
    for k in (15, 8, 3, 1):
        learner, rows, prompts = learner_with(pair, monkeypatch, k, budget=3.0)
        experience = learner.method.collect(
            *([row for row in each for _ in range(4)] for each in (rows, prompts)), learner.constraint()
        )
        if exact is None:
            exact = experience.stats.reverse_kl
        mask = experience.rollout.mask
        assert (experience.stats.reverse_kl <= exact + 1e-5)[mask].all()
        assert (experience.upper_cost >= exact - 1e-5)[mask].all()
        metrics = learner.collector.measure(experience, learner.constraint())
        costs.append(metrics["cmdp/mean_cumulative"])
        proven.append(metrics["cmdp/certified"] + metrics["cmdp/refuted"])
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]
    assert proven == sorted(proven, reverse=True) and proven[0] == pytest.approx(1.0) and proven[-1] < 0.5


def test_without_the_least_likely_token_nothing_is_certified(pair, monkeypatch):
    learner, rows, prompts = learner_with(pair, monkeypatch, 3, floor=False, budget=100.0)
    metrics = learner.step(rows, prompts)
    assert metrics["cmdp/constraint_satisfaction"] == 1.0
    assert metrics["cmdp/certified"] == metrics["cmdp/refuted"] == 0.0


@pytest.mark.parametrize(("floor", "proven"), [(True, 1.0), (False, 0.0)])
def test_samples_say_what_is_proven(floor, proven, pair, monkeypatch):
    """With a budget that no bound exceeds; without the least likely token there is no upper one."""
    learner, rows, _ = learner_with(pair, monkeypatch, 15, floor=floor, budget=1e6)
    figures, samples = evaluate(learner.collector, learner.student, rows, learner.clock)
    assert figures["certified"] == proven and {one["certified"] for one in samples} == {bool(proven)}
    assert all(one["feasible"] for one in samples)
    named = samples_text([("student", samples)])
    assert ("within budget by a lower bound" in named) != bool(proven) and ", at least " in named


def test_kept_answers_are_as_good_as_those_that_are_asked_again(pair, monkeypatch):
    runs = []
    for size in (512, 0):
        learner, rows, prompts = learner_with(pair, monkeypatch, 4, teacher_cache_mb=size)
        torch.manual_seed(0)
        runs.append(untimed(learner.step(rows, prompts)))
    for name, value in runs[0].items():
        assert runs[1][name] == pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cost": "k1"}, "bound reverse_kl and forward_kl, not --cost k1"),
        ({"temperature": 0.7}, "at 0.7: --teacher-temperature 1"),
        ({"algorithm": "gkd", "jsd_beta": 0.5}, "not --algorithm gkd --jsd-beta 0.5"),
        ({"algorithm": "minillm", "teacher_mix": 0.0}, "not --algorithm minillm"),
    ],
)
def test_what_they_do_not_bound_is_refused(changes, message, pair):
    teacher = dataclasses.make_dataclass("Named", ["about"])(dataclasses.make_dataclass("About", ["answers"])("topk"))
    with pytest.raises(InputError, match=message):
        check_asked_cost(teacher, settings(pair, **changes))
    assert teachers.is_asked("vllm:x")
