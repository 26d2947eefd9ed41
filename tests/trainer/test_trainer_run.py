"""From the command line to the files of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_pair import PROBLEMS, arguments, untimed
from transformers import AutoModelForCausalLM, AutoTokenizer

from cmdp_fast.cli import main
from cmdp_fast.trainer.tasks import data


@pytest.fixture(scope="module")
def undrawn() -> None:
    """Here figures are drawn."""


@pytest.fixture(scope="module")
def finished_run(pair, tmp_path_factory, one_thread) -> Path:
    output = tmp_path_factory.mktemp("finished")
    assert main(arguments(pair, output)) == 0
    return output / "r"


def test_run_folder_is_complete(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    files = {"config.json", "summary.json", "metrics.jsonl", "curves.png", "samples.txt", "samples.jsonl"}
    assert names == files | {"tensorboard", "student", ".lock"}
    assert list((finished_run / "tensorboard").glob("events.out.tfevents.*"))
    assert (finished_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    text = (finished_run / "samples.txt").read_text()
    samples = [json.loads(line) for line in (finished_run / "samples.jsonl").read_text().splitlines()]
    for who in ("teacher", "student_before", "student_after"):
        assert who in text
        assert sum(sample["who"] == who for sample in samples) == 3 * sum(
            data.is_held_out(p["prompt"], 0.3) for p in PROBLEMS
        )


def test_summary_is_consistent(finished_run):
    summary = json.loads((finished_run / "summary.json").read_text())
    assert summary["budget"] == 2.0 and summary["steps"] == 2 and summary["interrupted"] is False
    held_out = [p for p in PROBLEMS if data.is_held_out(p["prompt"], 0.3)]
    for who in ("teacher", "student_before", "student_after"):
        result = summary[who]
        assert {"accuracy", "constraint_satisfaction", "mean_cumulative_kl", "mean_length", "examples"} <= result.keys()
        assert result["examples"] == 3 * len(held_out)
        assert 0 <= result["accuracy"] <= 1 and 0 <= result["constraint_satisfaction"] <= 1
        assert 1 <= result["mean_length"] <= 6
    assert summary["teacher"]["mean_cumulative_kl"] == pytest.approx(0, abs=1e-5)
    assert summary["teacher"]["constraint_satisfaction"] == 1
    assert summary["student_before"]["mean_cumulative_kl"] > 0.1
    seconds = summary["seconds"]
    assert seconds.keys() == {"rollout", "scoring", "update", "evaluation", "kernels"}
    assert all(value > 0 for value in seconds.values())
    assert seconds["kernels"] < seconds["scoring"] + seconds["update"]
    step = seconds["rollout"] + seconds["scoring"] + seconds["update"]
    assert summary["kernel_share_of_step"] == pytest.approx(seconds["kernels"] / step, abs=1e-3)


def test_metrics_have_the_names_of_trl_and_ours(finished_run):
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        trl = "reward reward_std kl entropy loss grad_norm learning_rate num_tokens step_time clip_ratio/region_mean"
        trl += " completions/mean_length completions/clipped_ratio rewards/exact_answer/mean"
        ours = "constraint_satisfaction mean_excess cvar accuracy cumulative_kl cumulative_k1 cumulative_k3"
        assert {*trl.split(), *(f"cmdp/{name}" for name in ours.split())} <= line.keys()
        assert all(math.isfinite(value) for value in line.values())
        # a token's mean times the tokens is a completion's mean times the completions
        assert line["kl"] * line["completions/mean_length"] == pytest.approx(line["cmdp/cumulative_kl"], rel=1e-5)


def test_saved_student_stands_alone(finished_run, pair):
    student = AutoModelForCausalLM.from_pretrained(finished_run / "student")
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "student")
    before = AutoModelForCausalLM.from_pretrained(pair["student"])
    assert tokenizer("1+8=")["input_ids"] == AutoTokenizer.from_pretrained(pair["student"])("1+8=")["input_ids"]
    changed = [not torch.equal(a, b) for a, b in zip(student.parameters(), before.parameters(), strict=True)]
    assert all(changed)
    assert student.generation_config.to_dict() == before.generation_config.to_dict()
    assert student(torch.tensor([[3, 4]])).logits.isfinite().all()


def test_same_seed_same_metrics(pair, finished_run, tmp_path):
    assert main(arguments(pair, tmp_path)) == 0
    assert main(arguments(pair, tmp_path, name="other", seed=1)) == 0
    first, again, other = (
        [untimed(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (finished_run, tmp_path / "r", tmp_path / "other")
    )
    assert first == again
    assert first != other


def test_unnamed_runs_are_numbered(pair, tmp_path):
    for _ in range(2):
        assert main(arguments(pair, tmp_path, name="", steps=1)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quickstart", "quickstart-2"]


REWARD_THAT_INTERRUPTS = """
import signal
calls = 0
def reward(completions, **columns):
    global calls
    calls += 1
    if calls == {at}:
        signal.raise_signal(signal.SIGINT)
    return [1.0] * len(completions)
"""


def test_interrupt_leaves_a_usable_folder(pair, tmp_path, capsys):
    # the reward is called for the two evaluations and then once a step: the fourth call is the second step's
    (tmp_path / "mine.py").write_text(REWARD_THAT_INTERRUPTS.format(at=4))
    assert (
        main(arguments(pair, tmp_path / "runs", steps=50, eval_every=0, rewards=f"{tmp_path / 'mine.py'}:reward"))
        == 130
    )
    folder = tmp_path / "runs" / "r"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["interrupted"] and summary["steps"] == 2  # the step at hand came to its end
    assert summary["student_before"]["examples"] > 0 and summary["student_after"] is None
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert (folder / "curves.png").stat().st_size > 0 and (folder / "samples.txt").stat().st_size > 0
    AutoModelForCausalLM.from_pretrained(folder / "student")
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == [".lock"]


def test_interrupt_before_the_first_step_leaves_nothing(pair, tmp_path):
    (tmp_path / "mine.py").write_text(REWARD_THAT_INTERRUPTS.format(at=1))
    assert main(arguments(pair, tmp_path / "runs", rewards=f"{tmp_path / 'mine.py'}:reward")) == 130
    assert not (tmp_path / "runs").exists()
