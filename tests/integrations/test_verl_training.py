"""A training run of verl's own launcher on a CPU, with Ray: two steps, and one more from their checkpoint."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip(
    "verl", reason="verl 0.9 requires transformers<5.11, older than the one tested here; .ci/run installs it beside"
)

import verl_run
from transformers import AutoModelForCausalLM

import cmdp_fast as cf
from cmdp_fast.objective import PIDController

BUDGET, TOPK, PROMPT = 1.0, 8, 4
SETTINGS = (
    f"algorithm.cmdp.budget={BUDGET}",
    "algorithm.cmdp.kind=pid",
    "algorithm.cmdp.coefficient=0.1",
    "algorithm.cmdp.pid_gains=[0.1,0.02,0.05]",
    "algorithm.rollout_correction.rollout_is=sequence",
    f"distillation.distillation_loss.topk={TOPK}",
)


def mean_cost(folder: Path, name: str) -> float:
    """What the first step's completions cost the student that the run began with, by the two models themselves."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder / part) for part in ("student", "teacher"))
    sequences = [json.loads(line) for line in (folder / f"{name}.scored").read_text().splitlines()[:16]]
    total = 0.0
    for sequence in sequences:
        ids = torch.tensor([sequence])
        with torch.no_grad():
            x, y = (model(ids).logits[0, PROMPT - 1 : -1] for model in (student, teacher))
        values, tokens = y.log_softmax(-1).topk(TOPK, -1)
        total += cf.topk_stats(x, tokens, values, ids[0, PROMPT:]).forward_kl.sum().item()
    return total / len(sequences)


def test_verls_launcher_trains_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    steps = verl_run.run(tmp_path, *SETTINGS, name="first")
    assert list(steps) == [1, 2]
    last = tmp_path / "checkpoints" / "global_step_2"
    assert {path.name for path in last.iterdir()} == {"actor", "data.pt", "cmdp_pid.json"}
    assert steps[1]["cmdp/mean_cumulative"] == pytest.approx(mean_cost(tmp_path, "first"), rel=5e-3)  # bfloat16

    resumed = verl_run.run(tmp_path, *SETTINGS, "trainer.total_training_steps=3", name="second")
    assert list(resumed) == [3]
    controller = PIDController(kp=0.1, ki=0.02, kd=0.05, initial_integral=0.1)
    for step, metrics in (steps | resumed).items():
        price = controller.update(metrics["cmdp/mean_cumulative"], BUDGET)
        assert metrics["cmdp/lambda"] == price > 0.1, step
        # the engine samples from the student that is trained: it gets its weights
        assert metrics["training/rollout_probs_diff_max"] < 0.05
        assert metrics["rollout_corr/rollout_is_mean"] == pytest.approx(1.0, abs=0.05)
        direct = metrics["actor/distillation/loss"]
        assert direct == pytest.approx(price * metrics["cmdp/mean_cumulative"], rel=0.05)
        assert metrics["actor/distillation/cmdp_spent"] == pytest.approx(metrics["cmdp/mean_cumulative"], rel=1e-3)
        assert metrics["actor/loss"] == pytest.approx(metrics["actor/pg_loss"] + direct, rel=1e-4)
        assert math.isfinite(metrics["actor/loss"]) and 0 < metrics["actor/grad_norm"] < 1e3
    assert json.loads((tmp_path / "checkpoints/global_step_3/cmdp_pid.json").read_text()) == controller.state_dict()


ENDS = """
import os, subprocess, sys
worker = subprocess.Popen(["sleep", "1000"])
with open("pids", "w") as file:
    file.write(f"{os.environ['TMPDIR']} {worker.pid}")
"""


@pytest.mark.parametrize(
    ("ends", "error"),
    [
        ("sys.exit(3)", subprocess.CalledProcessError),
        ("os.kill(os.getpid(), 9)", subprocess.CalledProcessError),
        ("worker.wait()", TimeoutError),
    ],
)
def test_a_launcher_that_fails_or_hangs_leaves_nothing(monkeypatch, tmp_path: Path, ends: str, error: type) -> None:
    monkeypatch.setattr(verl_run, "prepare", lambda folder: None)
    monkeypatch.setattr(verl_run, "command", lambda folder: [sys.executable, "-c", ENDS + ends])
    monkeypatch.setattr(verl_run, "LIMIT", 600.0 if error is not TimeoutError else 3.0)
    with pytest.raises(error):
        verl_run.run(tmp_path)
    scratch, worker = (tmp_path / "pids").read_text().split()
    assert not Path(scratch).exists()
    assert verl_run.session(int(worker)) is None
