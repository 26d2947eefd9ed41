"""Ctrl-C in every phase of every command: exit code 130, one line, and a folder that goes on or a name that is free."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_ending import command, left_by
from tiny_pair import arguments_for
from written_runs import write_run

from cmdp_fast.cli import main
from cmdp_fast.errors import InputError
from cmdp_fast.teachers.cached.writer import CacheWriter
from cmdp_fast.trainer import evaluate_student, experience, run, training
from cmdp_fast.trainer.cache_teacher import CacheConfig
from cmdp_fast.trainer.comparison import compare, launching, warm
from cmdp_fast.trainer.experience import Collector
from cmdp_fast.trainer.interrupts import PENDING, Interrupts
from cmdp_fast.trainer.records import checkpoint, metrics_log
from cmdp_fast.trainer.records.report import Report
from cmdp_fast.trainer.run_report import command as report_command
from cmdp_fast.trainer.step import Learner


@pytest.fixture(scope="module")
def expected(pair, tmp_path_factory, one_thread):
    output = tmp_path_factory.mktemp("expected")
    assert main(command(pair, output, steps=3, checkpoint_every=1)) == 0
    return left_by(output / "r")


def interrupt_at(call: int, owner, name: str, patch, times: int = 1, number: int = signal.SIGINT) -> None:
    """So many signals as a function is called for the so-many-th time."""
    original, calls = getattr(owner, name), 0

    def interrupted(*args, **options):
        nonlocal calls
        calls += 1
        for _ in range(times if calls == call else 0):
            signal.raise_signal(number)
        return original(*args, **options)

    patch.setattr(owner, name, interrupted)


# Where, and whether the run's folder is there by then
PHASES = {
    "loading": (run, "load", 1, False),
    "the first evaluation": (experience, "generate", 1, False),
    "the folder's making": (metrics_log.MetricsLog, "__init__", 1, True),
    "rollout": (experience, "generate", 4, True),  # two evaluations and a step were before
    "scoring": (Collector, "score", 4, True),
    "update": (Learner, "descend", 5, True),
    "a checkpoint": (checkpoint, "write_sealed", 2, True),
    "the last evaluation": (training, "evaluate", 5, True),  # teacher, student, and one after each step but the last
    "the student's saving": (training, "save_student", 1, True),
    "the summary": (training, "write_summary", 1, True),
}
# Where a second one leaves no time to say it
SHORT = {("__init__", 2), ("save_student", 2), ("write_summary", 2)}


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("phase", PHASES)
def test_a_training_goes_on(phase, times, pair, tmp_path, expected, monkeypatch, capsys):
    owner, name, call, there = PHASES[phase]
    words = command(pair, tmp_path, steps=3, checkpoint_every=1)
    with monkeypatch.context() as patch:
        interrupt_at(call, owner, name, patch, times)
        code = main(words)
    told = capsys.readouterr()
    if code == 0:  # one that lets the writing end
        assert times == 1 and name in ("save_student", "write_summary")
    else:
        assert code == 130 and told.err == "cmdp-fast: interrupted\n"
        if there and (name, times) not in SHORT:
            line = told.out.splitlines()[-1]
            assert line.startswith("interrupted after step") and "cmdp-fast train --resume" in line
    assert (tmp_path / "r").exists() == there
    assert main(["train", f"--resume={tmp_path / 'r'}"] if there else words) == 0
    assert left_by(tmp_path / "r") == expected


def test_in_a_hurry_nothing_is_begun_that_takes_long(pair, tmp_path, monkeypatch):
    interrupt_at(5, Learner, "descend", monkeypatch, times=2)
    monkeypatch.setattr(training, "save_student", lambda *_: pytest.fail("a student is written"))
    assert main(command(pair, tmp_path, steps=3, checkpoint_every=1)) == 130
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["interrupted"] and summary["student_step"] is None and summary["steps"] == 1


def test_a_signal_that_waits_says_so():
    notes: list[str] = []
    with Interrupts(note=notes.append) as interrupts:
        interrupts.deferred = True
        signal.raise_signal(signal.SIGINT)
        assert notes == [PENDING] and interrupts.received and not interrupts.hurried
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert interrupts.hurried


def test_one_that_is_ignored_stays_so():
    """As a shell has it for what a script puts into the background."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
            assert not interrupts.received
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_with_several_processes_a_second_one_changes_nothing():
    """Their launcher sends it by itself. What waits for none of them is left at once."""
    with Interrupts(patient=True) as interrupts:
        interrupts.deferred = True
        try:
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:  # which would end all tests
            pytest.fail("it is not patient")
        assert interrupts.received and not interrupts.hurried
        interrupts.deferred = False
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not interrupts.hurried


def test_a_second_one_while_the_checkpoint_of_the_end_is_written(pair, tmp_path, expected, monkeypatch):
    """Where no other was asked for: without it all steps would be lost."""
    with monkeypatch.context() as patch:
        interrupt_at(2, Learner, "update", patch)
        interrupt_at(1, checkpoint, "write_sealed", patch)
        assert main(command(pair, tmp_path, steps=3)) == 130
    folder = tmp_path / "r"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]
    assert json.loads((folder / "summary.json").read_text())["student_step"] is None  # in a hurry
    assert main(["train", f"--resume={folder}"]) == 0
    assert left_by(folder) == expected


def test_at_the_end_of_the_process_another_one_ends_it_at_once(monkeypatch):
    """What still runs is in threads, and is waited for. A program that calls `main` keeps its handler."""
    monkeypatch.setattr("cmdp_fast.cli._runner", lambda _: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(sys, "argv", ["cmdp-fast", "train"])
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    try:
        assert main(["train"]) == 130 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert main() == 130 and signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, handler)


def test_while_it_imports(monkeypatch, capsys):
    monkeypatch.setattr("cmdp_fast.cli._runner", lambda _: signal.raise_signal(signal.SIGINT))
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "cmdp-fast: interrupted\n"


# ------------------------------------------------------------------------------------- nobody reads any more


@contextmanager
def piped() -> Iterator[Callable[[], None]]:
    """Both outputs in a pipe, as with `2>&1 | tee log`; what closes the end that is read."""
    read, written = os.pipe()
    with open(written, "w", encoding="utf-8") as pipe, open(read, "rb") as reader:
        with redirect_stdout(pipe), redirect_stderr(pipe):
            yield reader.close
        assert reader.closed
        pipe.flush()  # as Python does at its end


def test_a_closed_pipe_stops_no_run(pair, tmp_path, expected, monkeypatch):
    """`| head`."""
    step = Learner.step

    def close_and_step(self, *args):
        close()
        return step(self, *args)

    monkeypatch.setattr(Learner, "step", close_and_step)
    with piped() as close:
        assert main(command(pair, tmp_path, steps=3, checkpoint_every=1)) == 0
    assert left_by(tmp_path / "r") == expected


@pytest.mark.parametrize("how", ["an interrupt", "an error"])
def test_a_run_that_is_stopped_without_a_reader_keeps_everything(how, pair, tmp_path, expected, monkeypatch):
    """Ctrl-C comes to `tee` too, which ends first."""
    step, folder = Learner.step, tmp_path / "r"

    def stopped(self, *args):
        if self.steps_done == 1:
            close()
            if how == "an error":
                raise InputError("it is over")
            signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    with monkeypatch.context() as patch, piped() as close:
        patch.setattr(Learner, "step", stopped)
        assert main(command(pair, tmp_path, steps=3, checkpoint_every=1)) == (130 if how == "an interrupt" else 2)
    done = 2 if how == "an interrupt" else 1
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["student_step"] == summary["steps"] == done and (folder / "student" / "model.safetensors").is_file()
    assert (folder / "checkpoints" / f"step-{done:06d}").is_dir()
    assert main(["train", f"--resume={folder}"]) == 0
    assert left_by(folder) == expected


def test_a_disk_that_is_full_of_the_log_stops_no_run(pair, tmp_path, monkeypatch):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(command(pair, tmp_path, steps=1)) == 0
        full.flush()
    assert (tmp_path / "r" / "student").is_dir()


# ------------------------------------------------------------------------------------- other commands


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("call", [1, 2])
def test_cache_teacher_in_the_middle_of_a_shard(call, times, pair, tmp_path, monkeypatch, capsys):
    """The prompts at hand are stored, and what waits for a shard; in a hurry nothing is. It counts on from there."""

    def words(folder: str) -> list[str]:
        given = arguments_for(CacheConfig, "cache-teacher", pair, prompts_per_step=2)
        return [*given, f"--output={tmp_path / folder}"]

    assert main(words("whole")) == 0
    with monkeypatch.context() as patch:
        interrupt_at(call, CacheWriter, "store", patch, times, signal.SIGTERM)
        assert main(words("c")) == 130
    told = capsys.readouterr()
    kept = 2 * call if times == 1 else 0
    assert told.err == "cmdp-fast: interrupted\n" and f"c has {kept} of 9 prompts; the same command" in told.out
    assert main(words("c")) == 0
    said = capsys.readouterr().out
    assert re.search(r"9/9  36 completions ", said) and "36 completions of 9 prompts" in said
    whole, folder = (stored_in(tmp_path / name) for name in ("whole", "c"))
    assert whole.keys() == folder.keys() and all(torch.equal(whole[name], folder[name]) for name in whole)


def stored_in(folder: Path) -> dict[str, torch.Tensor]:
    """What the shards of a cache hold, behind one another."""
    shards = [load_file(path) for path in sorted(folder.glob("shard*"))]
    assert shards
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0] if name != "places"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_evaluate(number, pair, tmp_path, monkeypatch, capsys):
    interrupt_at(1, evaluate_student, "evaluate", monkeypatch, 1, number)
    words = [f"--{name}={value}" for name, value in {**pair, "task": ""}.items()]
    assert main(["evaluate", *words, "--prompt-template=", "--answer-pattern=", f"--json={tmp_path / 'f.json'}"]) == 130
    assert capsys.readouterr().err == "cmdp-fast: interrupted\n" and not list(tmp_path.iterdir())


def test_compare_hears_a_kill(tmp_path, monkeypatch, capsys):
    interrupt_at(1, compare, "plan", monkeypatch, 1, signal.SIGTERM)
    assert main(["compare", "--recipe=quickstart", f"--output-dir={tmp_path}"]) == 130
    assert capsys.readouterr().err == "cmdp-fast: interrupted\n"


def test_report(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "r")
    monkeypatch.setattr(report_command, "plot_png", lambda *_: b"not drawn")
    words = ["report", str(folder), f"--output-dir={tmp_path / 'report'}"]
    with monkeypatch.context() as patch:
        interrupt_at(2, report_command, "write_text", patch)
        assert main(words) == 130
    assert capsys.readouterr().err == "cmdp-fast: interrupted\n"
    assert not (tmp_path / "report" / "samples.html").exists()
    assert main(words) == 0
    assert len(list((tmp_path / "report").iterdir())) == 3


def test_compare_says_what_it_has(tmp_path, monkeypatch, capsys):
    """Between two runs, or inside of one: those that have ended are kept."""

    class Trainings:
        def start(self, *_) -> None:
            pass

        def ended(self) -> tuple[str, int]:
            if not first:
                raise KeyboardInterrupt
            return first.pop(), 1

    class Config:
        name, output_dir = "r", str(tmp_path)

    first = ["r"]
    monkeypatch.setattr(launching, "trainings", lambda *_, **__: nullcontext(Trainings()))
    ran = launching.run_all([Config()] * 3, 1, tmp_path / "logs", 0, Report())
    assert next(ran)[1].startswith("exit code 1")
    with pytest.raises(KeyboardInterrupt):
        next(ran)
    assert "interrupted after 1 of 3: " in capsys.readouterr().out


def test_compare_ends_its_trainings_at_once_on_a_second_one(tmp_path, monkeypatch):
    """They do not listen to what ends them, as in a step that takes long."""
    deaf = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    monkeypatch.setattr(warm, "command", lambda *_: [sys.executable, "-c", deaf])
    wait, begun = subprocess.Popen.wait, []

    def interrupted(self, timeout=None):
        if self not in begun:
            begun.append(self)
            raise KeyboardInterrupt
        return wait(self, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    (tmp_path / "lock").touch()
    lock = os.open(tmp_path / "lock", os.O_RDWR)
    with pytest.raises(KeyboardInterrupt), warm.trainings(1, lock, tmp_path / "log", warm=False) as processes:
        processes._process.stdout.readline()
        raise KeyboardInterrupt
    os.close(lock)
    assert begun[0].returncode == -signal.SIGKILL
