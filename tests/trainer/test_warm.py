"""The process that a comparison's trainings are forked from: none of them outlives whoever asked for it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import pytest

from cmdp_fast.errors import InputError
from cmdp_fast.trainer.comparison import warm
from cmdp_fast.trainer.records.lock import alone_in, name_holder


class Server(NamedTuple):
    """The process, the end of its input that is written to, and its answers."""

    pid: int
    told: int
    answers: IO[str]

    def code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def line(folder: Path, name: str) -> bytes:
    return (
        json.dumps({"name": name, "config": {"name": str(folder / name)}, "log": str(folder / "log")}).encode() + b"\n"
    )


def until_it_is_there(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    """One whose trainings leave a file and last until they are ended."""

    def trained(config: dict[str, str]) -> int:
        Path(config["name"]).touch()
        signal.pause()
        return 0

    monkeypatch.setattr(warm, "trained", trained)
    (told, tell), (hear, answers) = os.pipe(), os.pipe()
    if not (pid := os.fork()):
        try:
            os.close(tell)
            with open(answers, "w") as said:
                warm.serve(told, said)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(told)
    os.close(answers)
    with open(hear) as heard:
        yield Server(pid, tell, heard)


def test_what_is_no_part_of_the_extra_is_not_needed(monkeypatch):
    imported: list[str] = []
    find = importlib.util.find_spec
    monkeypatch.setattr(warm.importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    monkeypatch.setattr(warm.importlib, "import_module", imported.append)
    warm.import_all()
    assert "peft" not in imported and {"cmdp_fast.trainer.run", "reasoning_gym"} <= {*imported}


@pytest.mark.parametrize("how", ["its input ends", "a signal"])
def test_all_that_run_are_ended(how, server, tmp_path):
    for name in ("a", "b"):
        os.write(server.told, line(tmp_path, name))
    for name in ("a", "b"):
        until_it_is_there(tmp_path / name)
    if how == "a signal":
        os.kill(server.pid, signal.SIGTERM)
        assert server.code() == 0
    os.close(server.told)
    assert how == "a signal" or server.code() == 0
    assert server.answers.read() == ""  # with the last of them the pipe is closed


def test_nothing_is_started_for_one_who_has_gone(tmp_path, monkeypatch):
    """Killed while the process imported: what was asked for meanwhile waits in the pipe."""
    monkeypatch.setattr(warm, "_forked", lambda *_: pytest.fail("a training is started"))
    told, tell = os.pipe()
    os.write(tell, line(tmp_path, "a") + line(tmp_path, "b"))
    os.close(tell)
    with open(os.devnull, "w") as answers:
        warm.serve(told, answers)
    os.close(told)


def test_a_signal_at_the_first_moment_ends_a_training(tmp_path, monkeypatch):
    """It comes between the fork and the child's own handlers."""
    fork = os.fork

    def forked() -> int:
        pid = fork()
        if not pid:
            os.kill(os.getpid(), signal.SIGTERM)
        return pid

    monkeypatch.setattr(warm, "trained", lambda _: 0)
    monkeypatch.setattr(warm.os, "fork", forked)
    previous = signal.signal(signal.SIGTERM, lambda *_: None)  # as `serve` notes it
    try:
        with open(os.devnull, "w") as answers:
            pid = warm._forked(json.loads(line(tmp_path, "a")), answers)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_the_lock_names_the_process_that_is_left(tmp_path):
    with alone_in(tmp_path, print) as lock:
        with name_holder(lock, "its trainings: process 7"):
            assert "its trainings: process 7" in refused(tmp_path)
        assert f"process {os.getpid()} on " in refused(tmp_path) and "trainings" not in refused(tmp_path)


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as error, alone_in(folder, print):
        pass
    return str(error.value)
