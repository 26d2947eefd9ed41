"""The study whose optimum is known: its training, how it goes on, and what its page makes of the lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import sampled
import torch
from exact import Setting, tree

from cmdp_fast.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


known_page = pytest.importorskip("known_page", reason="draws, which needs matplotlib")
known_transfer = pytest.importorskip("known_transfer", reason="needs the trainer's packages")

SHORT = sampled.Schedule(steps=3, completions=16)


def line(situation: str, method: str, candidate: str, scores: list[float], within: float = 1.0) -> dict:
    numbers = {name: [0.1] * len(scores) for name in known_page.FIGURES}
    names = {"situation": situation, "method": method, "candidate": candidate, "seeds": list(range(len(scores)))}
    return names | numbers | {"score": scores, "within": [within] * len(scores)}


@pytest.mark.parametrize("kind", ["cmdp", "pid", "lagrangian"])
def test_seeds_side_by_side_are_trainings_one_by_one(kind):
    method = sampled.Method(Setting(kind, 0.3, coefficient=0.3))
    together = sampled.train(tree(), method, SHORT, [3, 4])
    alone = [sampled.train(tree(), method, SHORT, [seed])[0] for seed in (3, 4)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-12)
    assert not torch.equal(*together)


def test_the_training_reaches_the_optimum_of_the_tree():
    """With the schedule of the study; the figures are those of every path."""
    situation = known_transfer.situations()[0]
    method = sampled.Method(Setting("hinge", situation.budget, weight=3.0))
    figures = known_transfer.figures(situation, sampled.train(situation.seen, method, known_transfer.SCHEDULE, [0])[0])
    assert figures["within"] == 1.0
    assert situation.optimum - 0.004 < figures["score"] == figures["reward"] < situation.optimum + 0.001


def test_a_scale_is_of_the_reward_that_a_training_sees():
    scaled = next(each for each in known_transfer.situations() if each.scale == 100)
    assert float(scaled.seen.reward.max()) == 100 * float(scaled.problem.reward.max())
    logits = scaled.problem.teacher.log()
    assert known_transfer.figures(scaled, logits)["reward"] == 0.305  # the teacher's, as tests/vectors say


def test_a_range_is_the_same_at_every_scale():
    of = {each.name: each.in_range for each in known_transfer.situations()}
    for name in ("tree", "bandit"):
        one, large = (of[f"{name}, reward x {scale}"].reward.sum(1) for scale in (1, 100))
        assert (float(one.min()), float(one.max())) == (0.0, 1.0)
        torch.testing.assert_close(one, large)


def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """A half line is dropped and its training done again; runs of another schedule are refused."""
    monkeypatch.setattr(known_transfer, "SCHEDULE", SHORT)
    first = known_transfer.situations()[:1]
    monkeypatch.setattr(known_transfer, "situations", lambda: first)
    settings = {
        "cmdp": {"a": sampled.Method(Setting("cmdp", 0.3))},
        "hinge": {"b": sampled.Method(Setting("hinge", 0.3))},
    }
    monkeypatch.setattr(known_transfer, "candidates", lambda budget: settings)
    command = ["known_transfer.py", "--seeds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--steps", "3"])
    known_transfer.main()
    path = tmp_path / "runs.jsonl"
    whole = path.read_text()
    head, cmdp, hinge = whole.splitlines()
    assert json.loads(cmdp)["seeds"] == [0, 1]
    path.write_text("\n".join([head, cmdp, hinge[:40]]))
    known_transfer.main()
    assert path.read_text() == whole
    assert {each.name for each in tmp_path.iterdir()} == {"README.md", "regret.png", "runs.jsonl", "summary.json"}
    monkeypatch.setattr(sys, "argv", [*command, "--steps", "4"])
    with pytest.raises(InputError, match="give another --out"):
        known_transfer.main()


def test_a_setting_is_chosen_among_those_within_budget():
    lines = [
        line("first", "a", "over", [0.9, 0.9], within=0.5),
        line("first", "a", "kept", [0.45, 0.5]),
        line("first", "a", "worse", [0.3, 0.3]),
        line("other", "a", "over", [0.2, 0.2]),
        line("other", "a", "kept", [0.3, 0.5], within=0.5),
        line("other", "a", "worse", [0.1, 0.1]),
    ]
    study = known_page.Study(
        lines, {"first": 0.5, "other": 0.8}, {"first": 0.2, "other": 0.3}, {"first": 0.1, "other": 0.2}, feasible=0.95
    )
    assert study.one_setting("a") == "kept"
    assert study.choice("other", "a") == "over"
    assert study.regret("other", "a", "kept").mean == pytest.approx(50.0)  # percent of 0.8
    assert known_page.verdicts(study)[-1] == (
        "- `a` (kept): 1 over budget (other), 0 within it, a tenth or more below; largest regret 50.0%."
    )
    assert known_page.dearest_cell(study, "other", "a", "kept") == "50"
    chosen = {row["situation"]: row["best setting here"]["candidate"] for row in study.summary()}
    assert chosen == {"first": "kept", "other": "over"}
