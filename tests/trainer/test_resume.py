"""Runs that stop and go on: whatever stops one, the rest of its metrics is bitwise that of a run that never stopped."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_pair import arguments, untimed

from cmdp_fast import digest
from cmdp_fast.cli import main
from cmdp_fast.trainer import training
from cmdp_fast.trainer.methods.ppo import PPO
from cmdp_fast.trainer.records import checkpoint as run_checkpoints
from cmdp_fast.trainer.records import metrics_log
from cmdp_fast.trainer.step import Learner

STEPS = 6
VARIANTS = {
    "cmdp": {"lr_schedule": "constant"},
    "gae": {"baseline": "gae", "lr_schedule": "cosine", "lr_warmup_steps": 3},
    "pid": {"kind": "pid", "coefficient": 0.1, "pid_gains": "0.1 0.1 0.1", "budget_start": 5.0, "budget_steps": 4},
    "lora": {"lora_rank": 2, "lr_schedule": "constant"},
    "sgd": {"optim": "sgd", "lr_warmup_steps": 3},  # which keeps nothing of its steps
}


def command(pair, output: Path, variant: str = "cmdp", **changes) -> list[str]:
    settings = {"steps": STEPS, "checkpoint_every": 2, "eval_every": 3, **VARIANTS[variant], **changes}
    gains = settings.pop("pid_gains", "")
    return arguments(pair, output, **settings) + (["--pid-gains", *gains.split()] if gains else [])


def metrics(folder: Path) -> list[dict]:
    return [untimed(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def steps_kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def uninterrupted(pair, tmp_path_factory, one_thread):
    """Of each variant the metrics, the last evaluation and the student."""
    found = {}
    for variant in VARIANTS:
        output = tmp_path_factory.mktemp(variant)
        assert main(command(pair, output, variant)) == 0
        found[variant] = metrics(output / "r"), summary(output / "r")["student_after"], output / "r"
    return found


def check_goes_on(folder: Path, uninterrupted, variant: str = "cmdp") -> None:
    assert main(["train", f"--resume={folder}"]) == 0
    expected, last, other = uninterrupted[variant]
    assert metrics(folder) == expected
    assert summary(folder)["student_after"] == last
    assert (folder / "student" / "model.safetensors").read_bytes() == (
        other / "student" / "model.safetensors"
    ).read_bytes()


def killed(inject, arguments: list[str]) -> None:
    """Runs the command in a child that `inject` has prepared to kill itself."""

    def child() -> None:
        inject()
        main(arguments)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def kill_at(owner, name: str, call: int, after: bool = False):
    """An injection: the process kills itself at a call of a function, before or after it has done its work."""

    def inject() -> None:
        original, calls = getattr(owner, name), 0

        def dying(*args, **options):
            nonlocal calls
            calls += 1
            if calls == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **options)
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, dying)

    return inject


MOMENTS = {
    "sampling": (PPO, "collect", 4, False),
    "between two minibatches": (Learner, "descend", 11, True),
    "metrics written": (metrics_log.MetricsLog, "step", 5, True),
    "checkpoint begun": (run_checkpoints, "write_sealed", 2, False),
    "checkpoint whole, the old not removed": (os, "rename", 3, True),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at(moment, pair, tmp_path, uninterrupted):
    killed(kill_at(*MOMENTS[moment]), command(pair, tmp_path))
    assert not (tmp_path / "r" / "summary.json").exists()
    assert all((whole / "run.json").exists() for whole in run_checkpoints.checkpoints(tmp_path / "r"))
    check_goes_on(tmp_path / "r", uninterrupted)
    assert steps_kept(tmp_path / "r") == ["step-000004", "step-000006"]


@pytest.mark.parametrize("variant", ["gae", "pid", "lora", "sgd"])
def test_value_head_schedules_lambda_and_adapter_go_on(variant, pair, tmp_path, uninterrupted):
    killed(kill_at(Learner, "descend", 20), command(pair, tmp_path, variant))
    check_goes_on(tmp_path / "r", uninterrupted, variant)


def test_a_run_that_is_not_evaluated_before(pair, uninterrupted, tmp_path):
    """It learns the same, resumes as any other, and its curves begin with the first evaluation on the way."""
    killed(kill_at(Learner, "step", 4), [*command(pair, tmp_path), "--no-eval-before"])
    check_goes_on(tmp_path / "r", uninterrupted)
    written = summary(tmp_path / "r")
    assert written["teacher"] is None and written["student_before"] is None
    samples = (tmp_path / "r" / "samples.jsonl").read_text().splitlines()
    assert samples and {json.loads(sample)["who"] for sample in samples} == {"student_after"}


def test_killed_before_the_first_checkpoint(pair, tmp_path, uninterrupted):
    killed(kill_at(PPO, "collect", 2), command(pair, tmp_path))
    check_goes_on(tmp_path / "r", uninterrupted)


def test_killed_from_outside_and_more_than_once(pair, tmp_path, uninterrupted):
    """A process of its own, at a moment that nobody chose."""
    folder, arguments = tmp_path / "r", command(pair, tmp_path)
    code = "import sys, torch; torch.set_num_threads(1); from cmdp_fast.cli import main; main(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL)
    metrics_file = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics_file.exists() and metrics_file.stat().st_size):
        time.sleep(0.005)
    time.sleep(random.random() * 0.3)
    process.kill()
    process.wait()
    if not (folder / "summary.json").exists():
        killed(kill_at(training, "evaluate", 1), ["train", f"--resume={folder}"])  # to which it comes from any moment
    check_goes_on(folder, uninterrupted)


# ------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(number, pair, tmp_path, uninterrupted, monkeypatch):
    original, calls = Learner.descend, 0

    def interrupted(self):
        nonlocal calls
        calls += 1
        if calls == 10:
            signal.raise_signal(number)
        return original(self)

    monkeypatch.setattr(Learner, "descend", interrupted)
    assert main(command(pair, tmp_path, checkpoint_every=0)) == 130
    folder = tmp_path / "r"
    assert summary(folder)["interrupted"] and summary(folder)["steps"] == 3 == len(metrics(folder))
    assert steps_kept(folder) == ["step-000003"] and (folder / "student").is_dir()
    check_goes_on(folder, uninterrupted)


def test_an_interrupt_of_the_last_evaluation_loses_nothing(pair, tmp_path, uninterrupted, monkeypatch):
    original = training.evaluate

    def interrupted(*args, **named):
        if args[-1] == "student_after":
            signal.raise_signal(signal.SIGINT)
        return original(*args, **named)

    monkeypatch.setattr(training, "evaluate", interrupted)
    assert main(command(pair, tmp_path, checkpoint_every=0)) == 130
    monkeypatch.undo()
    check_goes_on(tmp_path / "r", uninterrupted)


# ------------------------------------------------------------------------------------- what goes wrong


def test_a_full_disk_keeps_the_last_checkpoint(pair, tmp_path, uninterrupted, monkeypatch, capsys):
    original, calls = run_checkpoints.sync_folder, 0

    def full(folder):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(folder)

    monkeypatch.setattr(run_checkpoints, "sync_folder", full)
    assert main(command(pair, tmp_path)) == 2
    folder = tmp_path / "r"
    error = capsys.readouterr().err
    assert "step-000004 could not be written" in error and "No space left" in error
    assert "the last whole one is" in error and "step-000002" in error
    assert steps_kept(folder) == ["step-000002"]
    assert "No space left" in summary(folder)["error"] and summary(folder)["steps"] == 4
    check_goes_on(folder, uninterrupted)


def test_a_file_limit_stops_any_write(pair, tmp_path, uninterrupted, capsys):
    """Not injected: the kernel refuses, in PyTorch's or safetensors' own code."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        assert main(command(pair, tmp_path, steps=2)) == 0
        size = (tmp_path / "r" / "checkpoints" / "step-000002" / "optimizer.bin").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, hard))
        code = main(["train", f"--resume={tmp_path / 'r'}", f"--steps={STEPS}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert "step-000004 could not be written" in capsys.readouterr().err
    assert steps_kept(tmp_path / "r") == ["step-000002"]
    check_goes_on(tmp_path / "r", uninterrupted)


def test_metrics_that_cannot_be_written(pair, tmp_path, uninterrupted, monkeypatch, capsys):
    original = metrics_log.as_json

    def full(value, indent=None):
        if value.get("step") == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(value, indent)

    monkeypatch.setattr(metrics_log, "as_json", full)
    assert main(command(pair, tmp_path)) == 2
    assert "metrics.jsonl could not be written" in capsys.readouterr().err
    monkeypatch.undo()
    check_goes_on(tmp_path / "r", uninterrupted)


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(pair, tmp_path, uninterrupted, capsys):
    killed(kill_at(PPO, "collect", STEPS), command(pair, tmp_path))
    assert steps_kept(tmp_path / "r") == ["step-000002", "step-000004"]
    files = ["model.bin", "optimizer.bin", "random_states.bin", "run.json"]
    for file, truncated in zip(files, (True, False, False, True), strict=True):
        folder = tmp_path / file
        shutil.copytree(tmp_path / "r", folder)
        path = folder / "checkpoints" / "step-000004" / file
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if truncated else b"\xff" * len(content))
        check_goes_on(folder, uninterrupted)
        shown = capsys.readouterr().out
        assert "step-000004 cannot be read" in shown and "step-000002" in shown


def test_no_checkpoint_that_can_be_read(pair, tmp_path, capsys):
    assert main(command(pair, tmp_path, steps=2)) == 0
    (tmp_path / "r" / "checkpoints" / "step-000002" / "model.bin").unlink()
    capsys.readouterr()
    assert main(["train", f"--resume={tmp_path / 'r'}", "--steps=4"]) == 2
    error = capsys.readouterr().err
    assert "no checkpoint that can be used" in error and "model.bin" in error


def test_a_checkpoint_holds_no_pickle_that_is_run(pair, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    assert main(command(pair, tmp_path, steps=2)) == 0
    checkpoint = tmp_path / "r" / "checkpoints" / "step-000002"
    for name in ("model.bin", "optimizer.bin", "random_states.bin"):
        whole = (checkpoint / name).read_bytes()
        torch.save({"state": Evil()}, checkpoint / name)
        values = digest.read_sealed(checkpoint / "run.json")
        values["files"][name] = digest.sha256(checkpoint / name)
        digest.write_sealed(checkpoint / "run.json", values)
        assert main(["train", f"--resume={tmp_path / 'r'}", "--steps=4"]) == 2
        assert not (tmp_path / "owned").exists()
        (checkpoint / name).write_bytes(whole)


def test_a_gradient_that_is_not_finite(pair, tmp_path, monkeypatch, capsys):
    original, calls = Learner.backward, 0

    def broken(self, loss, outputs):
        nonlocal calls
        calls += 1
        original(self, loss * float("nan") if calls == 20 else loss, outputs)

    monkeypatch.setattr(Learner, "backward", broken)
    assert main(command(pair, tmp_path)) == 2
    folder = tmp_path / "r"
    assert "the gradient is not finite" in capsys.readouterr().err
    found = summary(folder)
    assert "not finite" in found["error"] and not found["interrupted"] and found["student_after"] is None
    assert steps_kept(folder)[-1] == f"step-{found['steps'] // 2 * 2:06d}"


# ------------------------------------------------------------------------------------- what may be changed


def test_a_finished_run_says_so_and_goes_further_if_asked(pair, tmp_path, uninterrupted, capsys):
    assert main(command(pair, tmp_path, steps=4)) == 0
    capsys.readouterr()
    assert main(["train", f"--resume={tmp_path / 'r'}"]) == 0
    assert "is finished" in capsys.readouterr().out
    assert main(["train", f"--resume={tmp_path / 'r'}", f"--steps={STEPS}"]) == 0
    assert metrics(tmp_path / "r") == uninterrupted["cmdp"][0]


def test_changes_that_would_make_it_another_run(pair, tmp_path, uninterrupted, capsys):
    folder = uninterrupted["gae"][2]
    for option, complaint in (
        ("--budget=3", "--budget 3.0"),
        ("--seed=1", "--seed 1"),
        ("--task=chain_sum", f"--task chain_sum: {folder} began with nothing, and a run goes on as it began"),
        ("--steps=8", "cosine learning rate"),
    ):
        assert main(["train", f"--resume={folder}", option]) == 2
        assert complaint in capsys.readouterr().err
    assert main(["train", f"--resume={uninterrupted['cmdp'][2]}", "--steps=5"]) == 2
    assert "has 6 behind it" in capsys.readouterr().err
    assert main(["train", f"--resume={tmp_path}"]) == 2
    assert "no run that can be resumed" in capsys.readouterr().err


def test_a_tracker_that_is_not_installed(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics_log.importlib.util, "find_spec", lambda name: None)
    assert main([*command(pair, tmp_path), "--trackers", "wandb"]) == 2
    assert "--trackers wandb" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_tensorboard_forgets_what_was_cut_off(pair, tmp_path, uninterrupted):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed(kill_at(PPO, "collect", STEPS), command(pair, tmp_path))
    time.sleep(1.1)  # TensorBoard orders its files by the second in which they began
    check_goes_on(tmp_path / "r", uninterrupted)
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("reward")] == list(range(1, STEPS + 1))


def test_mixed_precision_keeps_float32_weights(pair, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        assert main(command(pair, tmp_path, steps=2, mixed_precision="bf16")) == 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    checkpoint = tmp_path / "r" / "checkpoints" / "step-000002"
    assert {value.dtype for value in torch.load(checkpoint / "model.bin", weights_only=True).values()} == {
        torch.float32
    }
    optimizer = torch.load(checkpoint / "optimizer.bin", weights_only=True)
    assert {v.dtype for s in optimizer["state"].values() for v in s.values()} == {torch.float32}
