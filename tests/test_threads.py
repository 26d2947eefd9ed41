"""Calls in threads: their order, how many at once, and what the end of a process waits for."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from cmdp_fast.threads import Threads

ENDING = """
import sys, threading, time
from cmdp_fast.threads import Threads

begun = threading.Event()


def call():
    begun.set()
    {call}


Threads(1, daemon={daemon}).begin(call)
begun.wait()
"""


def test_calls_are_made_in_their_order_and_as_many_as_may_be_at_once():
    threads, going, open_, order = Threads(2), threading.Semaphore(0), threading.Event(), []

    def call(number: int) -> int:
        order.append(number)
        going.release()
        assert open_.wait(60)
        return number

    def of(number: int):
        return threads.begin(lambda: call(number))

    first, second = of(0), of(1)
    for _ in range(2):
        assert going.acquire(timeout=60)
    later = [of(number) for number in range(2, 6)]
    assert later[1].cancel() and sorted(order) == [0, 1]
    open_.set()
    assert [future.result(60) for future in (first, second, later[0], later[2], later[3])] == [0, 1, 2, 4, 5]
    assert sorted(order) == [0, 1, 2, 4, 5]
    assert of(6).result(60) == 6  # by a thread of its own, since the others have ended


def test_an_error_is_the_result_and_the_next_call_is_made():
    threads = Threads()
    wrong, right = threads.begin(lambda: 1 // 0), threads.begin(lambda: 1)
    with pytest.raises(ZeroDivisionError):
        wrong.result(60)
    assert right.result(60) == 1


def test_what_has_not_begun_can_be_left_out():
    threads, begun, open_ = Threads(), threading.Event(), threading.Event()
    first, second = threads.begin(lambda: (begun.set(), open_.wait(60))), threads.begin(int)
    assert begun.wait(60)
    threads.cancel()
    open_.set()
    assert first.result(60) and second.cancelled()


@pytest.mark.parametrize(
    ("daemon", "call", "said"),
    [(True, "threading.Event().wait()", ""), (False, "time.sleep(0.2); print('done', flush=True)", "done\n")],
)
def test_the_end_of_a_process_waits_for_calls_that_compute_alone(daemon, call, said):
    ending = [sys.executable, "-c", ENDING.format(daemon=daemon, call=call)]
    ended = subprocess.run(ending, capture_output=True, text=True, timeout=300, check=False)
    assert (ended.returncode, ended.stdout) == (0, said), ended.stderr
