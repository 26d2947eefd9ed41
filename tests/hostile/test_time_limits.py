"""How a call is watched that has its time: what counts, who is interrupted, what stays behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from faults import be_stopped, in_child
from hanging import called, loops

from cmdp_fast import time_limits
from cmdp_fast.errors import InputError
from cmdp_fast.judging.reward import JudgedReward
from cmdp_fast.time_limits import Limit, told_of

pytestmark = pytest.mark.usefixtures("soon")


def test_one_that_limits_itself_is_left_to_it():
    """As the judges in processes of their own do: each completion has its seconds, so a call may take any time."""

    class Judged:
        limits_itself = True

        def __call__(self, **_: Any) -> Any:
            time.sleep(0.3)
            return [1, 2]

    assert JudgedReward.limits_itself
    assert called(Judged()) == [1.0, 2.0]


def test_an_object_that_has_every_attribute_limits_nothing():
    """Such as one that passes all to a client of a service."""

    class Client:
        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: None

        def __call__(self, **_: Any) -> Any:
            time.sleep(60)

    with pytest.raises(InputError, match=r"has not returned for 0\.05 s"):
        called(Client())


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
        be_stopped(1.0)
        while time.monotonic() < begun + 1.1:
            time.sleep(0.01)
        return [1.0, 2.0]

    assert in_child(lambda: called(stops, Limit(0.7, "")) != [1.0, 2.0]) == 0
