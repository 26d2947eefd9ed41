"""Calls in threads that nobody waits for: not after an error of one, and not at the end of the process.

Those of an executor are joined as Python ends, and a server may take `--rollout-timeout` for the answer that each of
them waits for.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import TypeVar

T = TypeVar("T")


def begin(calls: Sequence[Callable[[], T]], most: int = 1) -> list[Future[T]]:
    """Begins the calls, in their order and up to ``most`` at once; one whose future is cancelled before is left out."""
    futures: list[Future[T]] = [Future() for _ in calls]
    left: queue.SimpleQueue[tuple[Callable[[], T], Future[T]]] = queue.SimpleQueue()
    for task in zip(calls, futures, strict=True):
        left.put(task)

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                call, future = left.get_nowait()
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(call())
                    except BaseException as error:
                        future.set_exception(error)

    for _ in range(min(most, len(calls))):
        threading.Thread(target=work, daemon=True).start()
    return futures


def results(futures: Sequence[Future[T]]) -> list[T]:
    """Their results; the first error is raised at once, and what has not begun then is not."""
    try:
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
