"""The quickstart with vLLM in the place of `generate`: both learn the same. on_vllm.py says where it is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from on_vllm import PYTHON, needs_vllm

from cmdp_fast.cli import main
from cmdp_fast.trainer.models import builtin
from cmdp_fast.trainer.records.report import Report
from cmdp_fast.trainer.settings.recipe import read_recipe
from cmdp_fast.trainer.tasks import data

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """The quickstart's, made as it makes them but with three heads of 32 numbers: vLLM takes none of 24 on a CPU."""
    folder = tmp_path_factory.mktemp("models")
    train = data.load_problems(read_recipe("quickstart", "")).train
    made = {}
    for role in ("student", "teacher"):
        recipe = dataclasses.replace(builtin.RECIPES[f"builtin:arithmetic-{role}"], heads=3)
        made[role] = folder / role
        builtin._make(recipe, train, made[role], Report(), role)
    return made


def test_a_run_learns_as_with_generate(models, tmp_path):
    """Two points of accuracy apart at most, and three deviations of what 512 completions of each show of that. With
    twice the quickstart's learning rate, half its steps are enough."""
    figures = {}
    for rollout, words in {"": [], "vllm": [f"--rollout-python={PYTHON}", "--rollout=vllm"]}.items():
        words += [f"--{role}={folder}" for role, folder in models.items()]
        words += ["--steps=60", "--learning-rate=3e-4", "--eval-generations=2", "--eval-every=0"]
        words += [f"--output-dir={tmp_path}", f"--name=with-{rollout}"]
        assert main(["train", *words]) == 0
        figures[rollout] = json.loads((tmp_path / f"with-{rollout}" / "summary.json").read_text())
        print(rollout or "generate", figures[rollout]["student_after"], figures[rollout]["seconds"])
    before, after, generated = (
        figures["vllm"]["student_before"],
        figures["vllm"]["student_after"],
        figures[""]["student_after"],
    )
    for ours, theirs in ((before, figures[""]["student_before"]), (after, generated)):
        p, count = theirs["accuracy"], theirs["examples"]
        assert abs(ours["accuracy"] - p) < 0.02 + 3 * (2 * p * (1 - p) / count) ** 0.5
    assert after["accuracy"] > before["accuracy"] + 0.2
    assert after["constraint_satisfaction"] > 0.95 and generated["constraint_satisfaction"] > 0.95
    lines = (tmp_path / "with-vllm" / "metrics.jsonl").read_text().splitlines()
    apart = [json.loads(line).get("sampling/sampling_logp_difference/max", 0.0) for line in lines]
    assert max(apart) < 1e-2
