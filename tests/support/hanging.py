"""Functions that never return, as rewards."""

from __future__ import annotations

import asyncio
import os
import queue
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from cmdp_fast import time_limits
from cmdp_fast.time_limits import Limit
from cmdp_fast.trainer.settings.config import TrainConfig
from cmdp_fast.trainer.tasks.rewards import call_rewards, trainer_state

ROWS = [{"prompt": "1", "answer": "1"}, {"prompt": "2", "answer": "2"}]
LIMIT = Limit(0.05, "--reward-timeout")


@pytest.fixture
def soon(monkeypatch):
    """Ticks that come soon; nothing stays armed."""
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
