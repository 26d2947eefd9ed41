"""A function of the user's that never returns, in Python, in C that waits and in C that computes: one line and an end,
and a run that goes on from there."""

from __future__ import annotations

import asyncio
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from faults import command, differences, in_child, result
from hanging import HANGS, LIMIT, ROWS, called, is_line, loops
from matplotlib.figure import Figure
from tiny_pair import arguments_for

from cmdp_fast import event_loop, time_limits
from cmdp_fast.cli import main
from cmdp_fast.cpu import native
from cmdp_fast.errors import InputError
from cmdp_fast.time_limits import Limit, told_of
from cmdp_fast.trainer.evaluate_student import EvaluateConfig
from cmdp_fast.trainer.tasks.step_verifiers import call_step_verifier

pytestmark = pytest.mark.usefixtures("soon")


@pytest.mark.parametrize("case", HANGS)
def test_a_reward_that_hangs_is_one_line(case):
    with pytest.raises(InputError) as raised:
        called(lambda **_: HANGS[case]())
    assert is_line(str(raised.value), "reward function mine on 2 completions")
    assert not signal.getitimer(signal.ITIMER_REAL)[0], "an alarm is left"
    assert called(lambda **_: [1, 2], Limit(60.0, "")) == [1.0, 2.0]


@pytest.mark.parametrize("case", ["a sleep", "a loop", "a pattern"])
def test_verifiers_too(case):
    with pytest.raises(InputError) as raised:
        call_step_verifier(lambda *_, **__: HANGS[case](), ROWS, ["a", "b"], LIMIT)
    assert is_line(str(raised.value), "the step verifier <lambda>")


def test_a_coroutine_that_waits_is_cancelled():
    ended = []

    async def waits(**_: Any) -> Any:
        try:
            await asyncio.sleep(600)
        finally:
            ended.append(1)

    with pytest.raises(InputError) as raised:
        called(waits)
    assert is_line(str(raised.value), "reward function mine on 2 completions") and ended == [1]


@pytest.mark.parametrize("case", ["a sleep", "an event", "a server"])
def test_a_coroutine_that_blocks_is_left_behind(case, tmp_path, monkeypatch):
    """In the thread that it has; the next ones get another, and their places are told from there."""
    monkeypatch.setattr(event_loop, "PATIENCE", 0.1)

    async def blocks(**_: Any) -> Any:
        HANGS[case]()

    async def later(**_: Any) -> Any:
        return [1, 2]

    async def loops_too(**_: Any) -> Any:
        loops()

    def child() -> int:
        places = []
        for function in (blocks, loops_too):
            with pytest.raises(InputError) as raised:
                called(function)
            assert is_line(str(raised.value), "reward function mine on 2 completions")
            places += re.findall(r"it is at (.*?:\d+)", str(raised.value))
            assert called(later, Limit(60.0, "")) == [1.0, 2.0]
        assert len({*places}) == 2
        return 0

    assert in_child(child, tmp_path / "told") == 0, (tmp_path / "told").read_text()


# What lets nobody of Python have a turn: a search by `re` looks for signals in the main thread alone.
SEARCHES: dict[str, Callable[[], Any]] = {
    "a search": lambda: HANGS["a pattern"](),
    "one after another": lambda: asyncio.gather(*[searches() for _ in range(3)], return_exceptions=True),
    "one that nobody awaits": lambda: asyncio.gather(asyncio.ensure_future(searches()), asyncio.sleep(600)),
    "one that is called back": lambda: asyncio.get_running_loop().call_soon(HANGS["a pattern"]) and asyncio.sleep(600),
    "one in a thread": lambda: asyncio.to_thread(HANGS["a pattern"]),
}


async def searches() -> Any:
    return HANGS["a pattern"]()


@pytest.mark.skipif(not hasattr(native, "Deadline"), reason="needs the native module")
@pytest.mark.parametrize("where", ["main", "notebook"])
@pytest.mark.parametrize("case", SEARCHES)
def test_a_coroutine_that_searches_for_ever_ends_the_process(case, where, tmp_path, monkeypatch):
    monkeypatch.setattr(time_limits, "GRACE", 0.3)
    monkeypatch.setattr(time_limits, "SPARE", 0.3)

    async def mine(**_: Any) -> Any:
        return await SEARCHES[case]()

    async def cell() -> None:
        called(mine)

    def child() -> int:
        called(mine) if where == "main" else asyncio.run(cell())
        return 0

    assert in_child(child, tmp_path / "told") == 2
    said = (tmp_path / "told").read_text()
    assert said == (
        "cmdp-fast: error: reward function mine on 2 completions has not returned for 0.05 s, and is given up "
        "(--reward-timeout): it does not listen, and the process is ended\n"
    )


def test_in_another_thread(tmp_path):
    """Where Python hears no signals."""

    def calls() -> None:
        with told_of("it", limit=LIMIT):
            loops()

    def child() -> int:
        thread = threading.Thread(target=calls)
        thread.start()
        thread.join()
        return 0

    assert in_child(child, tmp_path / "told") == 2
    (line,) = (tmp_path / "told").read_text().splitlines()
    assert line.startswith("cmdp-fast: error: it has not returned for 0.05 s, it is at")


def test_one_that_does_not_listen_ends_the_process(tmp_path):
    """As a kill would."""

    def never(**_: Any) -> Any:
        while True:
            try:
                while True:
                    time.sleep(1)
            except BaseException:
                pass

    def child() -> int:
        time_limits.GRACE = 0.2
        called(never)
        return 0

    assert in_child(child, tmp_path / "told") == 2
    (line,) = (tmp_path / "told").read_text().splitlines()
    assert line.startswith(
        "cmdp-fast: error: reward function mine on 2 completions has not returned for 0.05 s, it is at"
    )
    assert line.endswith("and is given up (--reward-timeout): it does not listen, and the process is ended")


MINE = """
import pathlib, time

def mine(completions, answer, **_):
    flag = pathlib.Path(__file__).with_name("hang")
    if flag.exists():
        if not int(flag.read_text()):
            time.sleep(600)
        flag.write_text(str(int(flag.read_text()) - 1))
    return [float(len(text)) for text in completions]
"""


def test_a_run_is_ended_and_goes_on_to_the_same_end(pair, tmp_path, monkeypatch, capsys, one_thread, undrawn):
    """In its second step; it is resumed with another limit."""
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    words = {"rewards": f"{path}:mine", "eval_every": 0, "reward_timeout": 100}
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write_bytes(b"not drawn"))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*command(pair, whole, **words), "--no-eval-before"]) == 0
    (tmp_path / "hang").write_text("1")
    capsys.readouterr()
    assert main([*command(pair, cut, **{**words, "reward_timeout": 1.0}), "--no-eval-before"]) == 2
    said = capsys.readouterr()
    assert "stopped by an error after step 1 of 2" in said.out
    (line,) = said.err.splitlines()
    assert line.startswith("cmdp-fast: error: reward function mine on 4 completions has not returned for 1 s, it is at")
    (tmp_path / "hang").unlink()
    assert main(["train", f"--resume={cut / 'r'}", f"--rewards={path}:mine", "--reward-timeout=100"]) == 0
    assert not differences(result(cut / "r"), result(whole / "r"))


def test_an_evaluation_is_ended(pair, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    (tmp_path / "hang").write_text("0")
    words = arguments_for(EvaluateConfig, "evaluate", pair, rewards=f"{path}:mine")
    assert main([*words, "--reward-timeout=0.1", f"--json={tmp_path / 'f.json'}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "f.json").exists()


def test_a_limit_that_nothing_reads_is_refused(pair, tmp_path, capsys):
    assert main([*command(pair, tmp_path), "--reward-timeout=5"]) == 2
    assert "a function of your own in --rewards or --step-verifier" in capsys.readouterr().err
