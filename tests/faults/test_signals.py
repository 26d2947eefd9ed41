"""SIGINT and SIGTERM in each phase: at once a line says what is waited for, and the run goes on to the same end."""

from __future__ import annotations

import os
import pty
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from faults import command, differences, in_child, result
from tiny_pair import arguments_for

from cmdp_fast.bench import suite
from cmdp_fast.cli import main
from cmdp_fast.teachers.cached.writer import CacheWriter
from cmdp_fast.trainer import evaluate_student, experience, run, training
from cmdp_fast.trainer.cache_teacher import CacheConfig
from cmdp_fast.trainer.comparison import launching
from cmdp_fast.trainer.evaluate_student import EvaluateConfig
from cmdp_fast.trainer.interrupts import Interrupts
from cmdp_fast.trainer.records import checkpoint, run_folder
from cmdp_fast.trainer.step import Learner

STOP = "; press again to stop now"
FIRST = "finishing step 1 of 2, then writing a checkpoint" + STOP
# In which function the signal comes, at which of its calls, and what is said
PHASES: dict[str, tuple[object, str, int, str]] = {
    "start": (run, "check_run_folder", 1, "stopping"),
    "loading": (run, "load", 1, "stopping"),
    "the first evaluation": (experience, "generate", 1, "stopping"),
    "the folder's making": (run_folder, "write_config", 1, "making the folder of the run" + STOP),
    "rollout": (experience, "generate", 3, FIRST),
    "update": (Learner, "descend", 2, FIRST),
    "a student's saving": (
        training,
        "save_student",
        1,
        "saving the student of step 1, then writing a checkpoint" + STOP,
    ),
    "an evaluation": (
        training,
        "evaluate",
        3,
        "finishing the evaluation after step 1, then writing a checkpoint" + STOP,
    ),
    "a checkpoint": (checkpoint, "write_sealed", 1, "writing the checkpoint of step 1" + STOP),
    "the last checkpoint": (checkpoint, "write_sealed", 2, "writing the checkpoint of step 2" + STOP),
    "the last evaluation": (training, "evaluate", 4, "leaving the last evaluation, then writing the student" + STOP),
    "the student's saving": (training, "save_student", 2, "writing the student and the summary" + STOP),
    "the summary": (training, "write_summary", 1, "writing the student and the summary" + STOP),
}


def at_call(patch, owner, name: str, call: int, act: Callable[[], None]) -> None:
    """Has a function do something else first when it is called for the so-many-th time."""
    original, calls = getattr(owner, name), 0

    def acting(*args, **options):
        nonlocal calls
        calls += 1
        if calls == call:
            act()
        return original(*args, **options)

    patch.setattr(owner, name, acting)


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_says_at_once_what_it_waits_for(phase, pair, tmp_path, expected, monkeypatch, capfd, pytestconfig):
    """The two signals in turn. Without --slow it goes on after SIGTERM alone: tests/trainer/test_interrupts.py has the
    other."""
    owner, name, call, text = PHASES[phase]
    number = (signal.SIGINT, signal.SIGTERM)[list(PHASES).index(phase) % 2]
    if number == signal.SIGTERM:
        text = text.replace("press again to stop", "a second signal stops it")
    said: list[str] = []

    def stop() -> None:
        capfd.readouterr()
        try:
            signal.raise_signal(number)
        finally:  # the phase has not gone on yet
            said.append(capfd.readouterr().err)

    with monkeypatch.context() as patch:
        at_call(patch, owner, name, call, stop)
        code = main(command(pair, tmp_path))
    assert said == [f"cmdp-fast: {text}\n"]
    assert code == (0 if phase in ("the student's saving", "the summary") else 130)
    if number == signal.SIGINT and not pytestconfig.getoption("--slow"):
        return
    words = ["train", f"--resume={tmp_path / 'r'}"] if (tmp_path / "r").exists() else command(pair, tmp_path)
    assert main(words) == 0
    assert differences(result(tmp_path / "r"), expected) == {} and os.listdir(tmp_path) == ["r"]


# ------------------------------------------------------------------------------------- a terminal, a pipe


@pytest.mark.parametrize("output", ["a terminal", "a pipe"])
def test_the_line_is_there_before_the_wait_ends(output, pair, tmp_path):
    """Of a step that goes on until somebody has read it."""
    read, written = pty.openpty() if output == "a terminal" else os.pipe()
    waits, go = os.pipe()

    def child() -> int:
        os.environ.pop("CI", None)
        os.environ["TERM"] = "xterm"
        for number in (1, 2):
            os.dup2(written, number)
        with open(1, "w", closefd=False) as stream, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            at_call(patch, Learner, "descend", 2, lambda: (signal.raise_signal(signal.SIGINT), os.read(waits, 1)))
            return main([*command(pair, tmp_path), "--no-eval-before"])

    seen: list[bytes] = []

    def look() -> None:
        while FIRST.encode() not in b"".join(seen):
            seen.append(os.read(read, 4096))
        os.write(go, b"x")
        with suppress(OSError):  # the terminal's other end has gone
            while piece := os.read(read, 4096):
                seen.append(piece)

    reader = threading.Thread(target=look, daemon=True)
    reader.start()
    code = in_child(child)
    os.close(written)
    reader.join(10)
    for descriptor in (read, waits, go):
        os.close(descriptor)
    text = b"".join(seen).decode()
    assert code == 130, text
    assert FIRST in text and "interrupted after step 1 of 2" in text and "Traceback" not in text


# ------------------------------------------------------------------------------------- other commands


def commands(pair, tmp_path: Path) -> dict[str, tuple[list[str], object, str, str]]:
    """Of each command its words, where the signal comes, and what is said."""
    bench = ["bench", "budget_trace", "--shapes=tiny", "--dtype=float32", "--peers=none", "--repeat=1", "--no-memory"]
    compare = ["compare", "--recipe=quickstart", "--methods", "cmdp", f"--output-dir={tmp_path / 'c'}"]
    cache = [*arguments_for(CacheConfig, "cache-teacher", pair), f"--output={tmp_path / 'cache'}"]
    evaluate = [*arguments_for(EvaluateConfig, "evaluate", pair), f"--json={tmp_path / 'f.json'}"]
    return {
        "evaluate": (evaluate, evaluate_student, "evaluate", "stopping"),
        "cache-teacher": (cache, CacheWriter, "store", "storing the prompts at hand" + STOP),
        "compare": (compare, launching, "trainings", "stopping"),
        "bench": (bench, suite, "measure", "finishing the round at hand" + STOP),
    }


@pytest.mark.parametrize("name", ["evaluate", "cache-teacher", "compare", "bench"])
def test_every_command_says_it_at_once(name, pair, tmp_path, monkeypatch, capfd):
    words, owner, function, text = commands(pair, tmp_path)[name]
    said: list[str] = []

    def stop() -> None:
        capfd.readouterr()
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            said.append(capfd.readouterr().err)

    at_call(monkeypatch, owner, function, 1, stop)
    assert main(words) == 130
    assert said == [f"cmdp-fast: {text}\n"]
    assert "Traceback" not in capfd.readouterr().err


def test_a_second_one_is_heard_too(capfd):
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        interrupts.deferred, interrupts.waits = True, "finishing step 12 of 20, then writing a checkpoint"
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    first = "cmdp-fast: finishing step 12 of 20, then writing a checkpoint; a second signal stops it now"
    assert capfd.readouterr().err.splitlines() == [first, "cmdp-fast: stopping"]


def test_of_several_processes_one_is_heard_once_and_nobody_is_told_to_repeat(capfd):
    with Interrupts(patient=True) as one, Interrupts(patient=True, heard=False) as other:
        one.deferred = other.deferred = True
        one.waits = "finishing step 12 of 20"
        for each in (one, other):
            each._handle(signal.SIGINT, None)
            each._handle(signal.SIGINT, None)
    assert capfd.readouterr().err == "cmdp-fast: finishing step 12 of 20\n"


def test_a_standard_error_that_is_closed(monkeypatch):
    monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(BrokenPipeError()))
    with Interrupts() as interrupts:
        interrupts.deferred = True
        signal.raise_signal(signal.SIGINT)
        assert interrupts.received


# ------------------------------------------------------------------------------------- other processes


def children(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    found = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*found, *(each for child in found for each in children(child))]


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "twice", "SIGKILL"])
def test_judges_do_not_outlive_a_run(how, pair, tmp_path, isolation, pytestconfig):
    """Ctrl-C comes to every process of a terminal's group."""
    if how in ("SIGINT", "SIGTERM") and not pytestconfig.getoption("--slow"):
        pytest.skip("the two that leave least time; with --slow all")
    judged = {"rewards": "math_verify", "steps": 1, "checkpoint_every": 0, "save_student_every": 0}
    pids, wanted = tmp_path / "pids", [signal.SIGINT] * 2 if how == "twice" else [signal.Signals[how]]

    def child() -> int:
        os.setsid()

        def stop() -> None:
            pids.write_text(" ".join(map(str, children(os.getpid()))))
            for number in wanted:
                os.killpg(0, number)

        with pytest.MonkeyPatch.context() as patch:
            at_call(patch, Learner, "descend", 1, stop)
            return main([*command(pair, tmp_path, **judged), "--no-eval-before"])

    assert in_child(child, tmp_path / "told") == (-signal.SIGKILL if how == "SIGKILL" else 130)
    judges = [int(pid) for pid in pids.read_text().split()]
    assert judges, (tmp_path / "told").read_text()
    until = time.monotonic() + 20
    while (left := [pid for pid in judges if alive(pid)]) and time.monotonic() < until:
        time.sleep(0.01)
    assert not left


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_with_an_engine_leaves_no_weights(number, pair, server, tmp_path, monkeypatch):
    weights = tmp_path / "weights"
    weights.mkdir()
    engine = {"rollout": "vllm", "rollout_url": server.url, "rollout_folder": weights, "eval_every": 0}
    words = [*command(pair, tmp_path / "out", **engine), "--no-eval-before"]
    with monkeypatch.context() as patch:
        at_call(patch, Learner, "descend", 2, lambda: signal.raise_signal(number))
        assert main(words) == 130
    assert not list(weights.iterdir())
    again = [f"--rollout-url={server.url}", f"--rollout-folder={weights}"]
    assert main(["train", f"--resume={tmp_path / 'out' / 'r'}", *again]) == 0
    assert not list(weights.iterdir())
