"""The end of a program in which functions have left something running."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest

from cmdp_fast import time_limits
from cmdp_fast.cli import main
from cmdp_fast.cpu import native

PROGRAM = """
import asyncio, atexit, concurrent.futures, contextlib, re, sys, time
from cmdp_fast import cli, event_loop, time_limits

def thread():
    with time_limits.told_of("it", limit=time_limits.Limit(0.1, "--limit")):
        concurrent.futures.ThreadPoolExecutor().submit(time.sleep, 600).result()

def task():
    async def searches():
        try:
            await asyncio.sleep(600)
        finally:
            re.match(r"(a+)+$", "a" * 60 + "!")

    async def begins():
        kept.append(asyncio.ensure_future(searches()))
        await asyncio.sleep(0.01)

    event_loop.run(begins)
    return 0

def bug():
    with contextlib.suppress(Exception):
        thread()
    raise OSError("no room")

def hook():
    async def begins():
        kept.append(asyncio.ensure_future(asyncio.sleep(600)))
        await asyncio.sleep(0.01)

    event_loop.run(begins)
    atexit.register(lambda: (time.sleep(1.5), print("uploaded")))
    return 0

kept = []
time_limits.GRACE = 0.5
if sys.argv[1] == "without":
    time_limits.native = None
left = globals()[sys.argv[2]]
cli._with_the_extra = lambda *_: left()
sys.argv = ["cmdp-fast", "train"]
sys.exit(cli.main())
"""
LEFT = "what coroutine functions have left running has not ended for 0.5 s, and the process is ended"
ENDS = {  # exit code, and the last line of stderr
    "thread": (2, "cmdp-fast: error: it has not returned for 0.1 s, and is given up (--limit)"),
    "bug": (1, "OSError: no room"),
    "task": (2, f"cmdp-fast: error: {LEFT}"),
    "hook": (0, ""),
}
WITHOUT_NATIVE = ("thread", "bug", "hook")  # then a search for ever keeps it


@pytest.mark.parametrize(
    ("left", "native_module"), [*[(left, "with") for left in ENDS], *[(left, "without") for left in WITHOUT_NATIVE]]
)
def test_what_is_left_running_does_not_keep_the_process(left, native_module):
    """A thread of an executor is waited for as Python ends; a task may do anything as it is cancelled. What ends by
    itself may take its time."""
    if native is None and native_module == "with":
        pytest.skip("there is no native module")
    program = [sys.executable, "-c", PROGRAM, native_module, left]
    done = subprocess.run(program, capture_output=True, text=True, timeout=100)
    assert (done.returncode, (done.stderr.splitlines() or [""])[-1]) == ENDS[left]
    assert left == "bug" or done.stderr.count("\n") < 2
    assert done.stdout == ("uploaded\n" if left == "hook" else "")


def test_a_program_that_gave_nothing_up_may_take_its_time(monkeypatch):
    monkeypatch.setattr(time_limits, "_given_up", False)
    monkeypatch.setattr(time_limits, "native", None)
    before = threading.active_count()
    time_limits.end_in_time(1)
    assert threading.active_count() == before


def test_one_that_comes_as_the_call_ends_is_a_line_too(monkeypatch, capsys):
    def late(*_: Any) -> int:
        raise time_limits.Overdue("it is given up")

    monkeypatch.setattr("cmdp_fast.cli._with_the_extra", late)
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "cmdp-fast: error: it is given up\n"
