"""Runs whose clock jumps, that were copied to another place, and that two processes want at once."""

from __future__ import annotations

import os
import shutil
import time
from datetime import datetime, timedelta
from multiprocessing import get_context
from pathlib import Path

import pytest
from faults import command, differences, in_child, result

from cmdp_fast.cli import main
from cmdp_fast.trainer.records import session
from cmdp_fast.trainer.step import Learner


@pytest.fixture(scope="module")
def stopped(pair, tmp_path_factory, one_thread, undrawn) -> Path:
    """A run that was killed in its second step."""
    output = tmp_path_factory.mktemp("stopped")

    def child() -> None:
        descend, calls = Learner.descend, 0

        def dying(self):
            nonlocal calls
            calls += 1
            if calls == 4:
                os.kill(os.getpid(), 9)
            return descend(self)

        Learner.descend = dying
        main(command(pair, output))

    assert in_child(child) == -9
    return output / "r"


@pytest.mark.parametrize("jump", [-86400.0 * 365, 86400.0 * 365])
def test_a_clock_that_jumps(jump, stopped, tmp_path, expected, monkeypatch):
    """At each look at it, by a year in turn."""
    real, looks = time.time, 0

    def jumping() -> float:
        nonlocal looks
        looks += 1
        return real() + jump * (looks % 2)

    class Clock(datetime):
        @classmethod
        def now(cls, zone=None):
            return super().now(zone) + timedelta(seconds=jumping() - real())

    shutil.copytree(stopped, tmp_path / "r")
    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(session, "datetime", Clock)
    for path in tmp_path.rglob("*"):  # older and newer than what comes from now on
        os.utime(path, (real() + jump, real() + jump))
    assert main(["train", f"--resume={tmp_path / 'r'}"]) == 0
    assert differences(result(tmp_path / "r"), expected) == {}


def test_a_copy_goes_on_elsewhere(stopped, tmp_path, expected, monkeypatch):
    """Under another name, by a relative path, while the first one is left alone; its lock's file names the killed."""
    before = result(stopped)
    shutil.copytree(stopped, tmp_path / "deep" / "copy")
    monkeypatch.chdir(tmp_path / "deep")
    assert main(["train", "--resume=copy"]) == 0
    assert differences(result(tmp_path / "deep" / "copy"), expected) == {} and result(stopped) == before
    assert os.listdir(tmp_path / "deep") == ["copy"]


@pytest.mark.parametrize("holder", ["a process that is gone", "a process that lives and is another's"])
def test_a_lock_that_is_nobodys(holder, stopped, tmp_path, expected):
    """A number of a process in a file keeps nobody away, whoever has that number now."""
    shutil.copytree(stopped, tmp_path / "r")
    pid = os.getppid() if "lives" in holder else 2**22 + 1
    (tmp_path / "r" / ".lock").write_text(f"process {pid} on {os.uname().nodename}\n")
    assert main(["train", f"--resume={tmp_path / 'r'}"]) == 0
    assert differences(result(tmp_path / "r"), expected) == {}


def test_two_at_once(stopped, tmp_path, expected):
    """Of two that go on with a run at the same moment one does, and the other says why it does not."""
    folder, context = tmp_path / "r", get_context("fork")
    shutil.copytree(stopped, folder)
    ready = context.Barrier(3)

    def both(number: int) -> None:
        def one() -> int:
            ready.wait()
            return main(["train", f"--resume={folder}"])

        os._exit(in_child(one, tmp_path / f"told{number}"))

    processes = [context.Process(target=both, args=(number,)) for number in (1, 2)]
    for process in processes:
        process.start()
    ready.wait()
    for process in processes:
        process.join(120)
    said = [(tmp_path / f"told{number}").read_text() for number in (1, 2)]
    codes = sorted(process.exitcode for process in processes)
    if codes == [0, 0]:  # one came when the other had ended
        assert any("is finished" in each for each in said)
    else:
        assert codes == [0, 2] and sum("is at work here" in each for each in said) == 1, said
    assert differences(result(folder), expected) == {}
