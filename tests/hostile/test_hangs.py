"""A function of the user's that never returns, in Python, in C that waits and in C that computes: one line and an end,
and a run that goes on from there."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from faults import command, differences, in_child, result
from matplotlib.figure import Figure
from tiny_pair import arguments_for

from cmdp_fast import event_loop, time_limits
from cmdp_fast.cli import main
from cmdp_fast.cpu import native
from cmdp_fast.errors import InputError
from cmdp_fast.judging.reward import JudgedReward
from cmdp_fast.time_limits import Limit, told_of
from cmdp_fast.trainer.evaluate_student import EvaluateConfig
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.tasks.rewards import call_rewards, trainer_state
from cmdp_fast.trainer.tasks.step_verifiers import call_step_verifier

ROWS = [{"prompt": "1", "answer": "1"}, {"prompt": "2", "answer": "2"}]
LIMIT = Limit(0.05, "--reward-timeout")


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(time_limits, "TICK", 0.02)
    yield
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0.0
    assert not time_limits._watch._calls


def loops() -> None:
    while True:
        pass


def locks() -> None:
    lock = threading.Lock()
    with lock, lock:
        pass


def listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.accept()


def reads() -> None:
    os.read(os.pipe()[0], 1)


def takes_anything() -> Any:
    try:
        time.sleep(600)
    except:  # noqa: E722
        return [1.0, 1.0]


def takes_some() -> Any:
    while True:
        try:
            time.sleep(600)
        except Exception:
            continue


def left_over() -> Any:
    """Of its own limit."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(100)
    time.sleep(600)


HANGS: dict[str, Callable[[], Any]] = {
    "a loop": loops,
    "a sleep": lambda: time.sleep(600),
    "a lock": locks,
    "a thread": lambda: threading.Thread(target=time.sleep, args=(0.5,)).run() or time.sleep(600),
    "an event": lambda: threading.Event().wait(),
    "a queue": lambda: queue.Queue().get(),
    "a server": listens,
    "a pipe": reads,
    "a process": lambda: subprocess.run(["sleep", "600"]),
    "a loop of its own": lambda: asyncio.run(asyncio.sleep(600)),
    "a pattern": lambda: re.match(r"(a+)+$", "a" * 60 + "!"),
    "a power": lambda: 9**9**9,
    "an exception for all": takes_anything,
    "an exception for some": takes_some,
    "an alarm": left_over,
    "a generator": lambda: (time.sleep(600) for _ in range(2)),
}


def called(function: Callable[..., Any], limit: Limit | None = LIMIT) -> list[float]:
    state = trainer_state(TrainConfig(task="chain_sum"))
    return call_rewards({"mine": function}, ROWS, ["a", "b"], [[1], [2]], state, limit).rewards["mine"]


def is_line(said: str, what: str) -> bool:
    place = rf"(, it is at {re.escape(__file__)}:\d+)?"
    return bool(re.fullmatch(rf"{what} has not returned for 0.05 s{place}, and is given up \(--reward-timeout\)", said))


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


def test_one_that_limits_itself_is_left_to_it():
    """As the judges in processes of their own do: each completion has its seconds, so a call may take any time."""

    class Judged:
        limits_itself = True

        def __call__(self, **_: Any) -> Any:
            time.sleep(0.3)
            return [1, 2]

    assert JudgedReward.limits_itself
    assert called(Judged()) == [1.0, 2.0]


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


def test_one_that_lets_nobody_have_a_turn_for_long_is_not_taken_for_a_process_that_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(time_limits, "BEAT", 0.02)

    async def searches(**_: Any) -> Any:
        for _ in range(200):  # each takes longer than twice the beat
            re.match(r"(a+)+$", "a" * 21 + "!")
        return [1, 2]

    def child() -> int:
        with pytest.raises(InputError):
            called(searches, Limit(1.0, ""))
        return 0

    assert in_child(child, tmp_path / "told") == 0, (tmp_path / "told").read_text()


@pytest.mark.parametrize("where", ["begin", "end"])
def test_ctrl_c_in_between_leaves_nothing_armed(where, monkeypatch):
    real, armed = getattr(time_limits._watch, where), []

    def interrupted(call: Any) -> None:
        real(call)
        raise KeyboardInterrupt

    class Deadline:
        def __init__(self, *_: Any) -> None:
            armed.append(self)

        def call_off(self) -> None:
            armed.remove(self)

    monkeypatch.setattr(time_limits, "native", SimpleNamespace(Deadline=Deadline))
    monkeypatch.setattr(time_limits._watch, where, interrupted)
    with pytest.raises(KeyboardInterrupt), told_of("it", limit=Limit(60.0, "")):
        pass
    assert not armed and not time_limits._watch._calls


def test_a_program_that_gave_nothing_up_may_take_its_time(monkeypatch):
    monkeypatch.setattr(time_limits, "_given_up", False)
    monkeypatch.setattr(time_limits, "native", None)
    before = threading.active_count()
    time_limits.end_in_time(1)
    assert threading.active_count() == before


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


def test_it_may_clean_up():
    ended = []

    def mine(**_: Any) -> Any:
        try:
            loops()
        finally:
            until = time.process_time() + 0.3  # some ticks
            while time.process_time() < until:
                pass
            ended.append(1)

    with pytest.raises(InputError):
        called(mine)
    assert ended == [1]


def test_calls_that_end_at_their_limit(tmp_path):
    """By themselves, or by it; nothing else is hit, and nothing is left behind."""
    for _ in range(200):
        with contextlib.suppress(InputError, time_limits.Overdue), told_of("it", limit=Limit(0.002, "")):
            until = time.perf_counter() + 0.002
            while time.perf_counter() < until:
                pass
    for _ in range(100):
        time.sleep(0.001)
    with told_of("it", limit=Limit(60.0, "")):
        pass


def test_a_call_that_is_over_is_not_looked_at(tmp_path):
    """It stands there for a moment more, and may be at its limit just then."""

    def child() -> int:
        here = threading.get_ident()
        call = time_limits._Call("it", "", here, Limit(0.0, ""), False, time.monotonic(), 0.0, over=True)
        time_limits._watch.begin(call)
        time.sleep(0.2)
        time_limits._watch.end(call)
        return 0

    assert in_child(child, tmp_path / "told") == 0


def test_one_that_comes_as_the_call_ends_is_a_line_too(monkeypatch, capsys):
    def late(*_: Any) -> int:
        raise time_limits.Overdue("it is given up")

    monkeypatch.setattr("cmdp_fast.cli._with_the_extra", late)
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "cmdp-fast: error: it is given up\n"


def test_ctrl_c_is_not_taken_for_the_limit():
    def mine(**_: Any) -> Any:
        try:
            loops()
        except BaseException:
            raise KeyboardInterrupt from None

    with pytest.raises(KeyboardInterrupt):
        called(mine)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="only Linux tells of handlers in C")
def test_a_signal_that_c_code_has_is_left_to_it(tmp_path):
    """As Go's runtime in a library has SIGURG."""

    def child() -> int:
        libc = ctypes.CDLL(None)
        for number in (signal.SIGURG, signal.SIGVTALRM):
            signal.signal(number, signal.SIG_DFL)
            libc.signal(number, libc.abs)
        assert called(lambda **_: [1, 2], Limit(60.0, "")) == [1.0, 2.0]
        assert all(time_limits._is_caught(number) for number in (signal.SIGURG, signal.SIGVTALRM))
        assert signal.getsignal(signal.SIGURG) is signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL
        called(lambda **_: loops())
        return 0

    assert in_child(child, tmp_path / "told") == 2
    assert "and the process is ended" in (tmp_path / "told").read_text()


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


def test_an_honest_one_may_take_its_time(caplog, monkeypatch):
    """It is told of a few times, ever more rarely; it may limit itself, and nothing of ours reaches it."""
    monkeypatch.setattr(time_limits, "NOTICE", 0.01)

    def slow(**_: Any) -> Any:
        def over(*_: Any) -> None:
            raise TimeoutError

        before = signal.signal(signal.SIGALRM, over)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            time.sleep(600)
        except TimeoutError:
            return [1.0, 2.0]
        finally:
            signal.signal(signal.SIGALRM, before)

    assert called(slow, Limit(60.0, "--reward-timeout")) == [1.0, 2.0]
    times = [line.split(" for ")[1].split(" s")[0] for line in caplog.messages]
    assert times[:2] == ["0.01", "0.02"] and len(times) < 9 and times == sorted(times, key=float)
    assert called(slow, None) == [1.0, 2.0]


def test_time_in_which_the_process_is_stopped_does_not_count(monkeypatch):
    """As by Ctrl-Z, or by a cluster that has something else to do."""
    monkeypatch.setattr(time_limits, "BEAT", 0.1)

    def stops(**_: Any) -> Any:
        begun = time.monotonic()
        if not (waker := os.fork()):
            time.sleep(1.0)
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSTOP)
        os.waitpid(waker, 0)
        while time.monotonic() < begun + 1.1:
            time.sleep(0.01)
        return [1.0, 2.0]

    assert in_child(lambda: called(stops, Limit(0.7, "")) != [1.0, 2.0]) == 0


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
