"""Calls in threads that nobody waits for: not after an error of one, and not at the end of the process.

Those of an executor are joined as Python ends, and a server may take as long as it was given for the answer that each
of them waits for.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any, TypeVar

T = TypeVar("T")


class Threads:
    """Calls in the order in which they come, up to ``most`` at once, each in a thread that ends where no call is left.

    ``daemon`` False: the process ends after them. It has to where they compute with PyTorch, which aborts a process
    that ends in the middle of it.
    """

    def __init__(self, most: int = 1, daemon: bool = True) -> None:
        self._most, self._daemon = most, daemon
        self._lock, self._working = threading.Lock(), 0
        self._left: deque[tuple[Callable[[], Any], Future[Any]]] = deque()

    def begin(self, call: Callable[[], T]) -> Future[T]:
        """Its result, under way; one whose future is cancelled before it has begun is left out."""
        future: Future[T] = Future()
        with self._lock:
            self._left.append((call, future))
            if self._working == self._most:
                return future
            self._working += 1
        threading.Thread(target=self._work, daemon=self._daemon).start()
        return future

    def cancel(self) -> None:
        """Leaves out what has not begun."""
        with self._lock:
            left, self._left = self._left, deque()
        for _, future in left:
            future.cancel()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._left:
                    self._working -= 1
                    return
                call, future = self._left.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # whatever it is, it is raised where the result is awaited
                    future.set_exception(error)


def begin(calls: Sequence[Callable[[], T]], most: int = 1) -> list[Future[T]]:
    """Begins the calls, in their order and up to ``most`` at once."""
    threads = Threads(most)
    return [threads.begin(call) for call in calls]


def results(futures: Sequence[Future[T]]) -> list[T]:
    """Their results; the first error is raised at once, and what has not begun then is not."""
    try:
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


def usable_processors() -> int:
    """The processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
