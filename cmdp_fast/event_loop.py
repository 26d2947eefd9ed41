"""The event loop in which plain code calls the user's coroutine functions.

It is the same one for all calls of this process: a client that such a function keeps, for a judge on a server say,
belongs to the loop that it was first used in. A thread runs it while calls last, many at once, and ends with the last
of them, so it does not matter whether the caller's own thread runs a loop already. A forked process begins anew, as its
parent's thread is not in it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import os
import selectors
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

THREAD = "cmdp_fast event loop"
PATIENCE = 5.0  # seconds that code which was interrupted gets to come to an end


class _EventLoop:
    _left: asyncio.AbstractEventLoop | None = None

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._calls = 0

    def begin_anew(self) -> None:
        """In a forked process, where nothing runs the parent's loop, and its lock may be held for ever."""
        self._left = self._loop or self._left  # its tasks are the parent's, and not to be collected as lost
        self.__init__()  # type: ignore[misc]

    def run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of the coroutine that ``make`` makes, or its exception; an interrupt of the caller cancels it."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("a coroutine function was called by plain code that another one called; await it there")
        ended = threading.Event()

        async def until_ended() -> T:
            try:
                return await make()
            finally:
                ended.set()

        with self._running() as loop:
            future = asyncio.run_coroutine_threadsafe(until_ended(), loop)
            try:
                return future.result()
            except BaseException:
                if future.cancel():  # it was the caller who was interrupted
                    ended.wait(PATIENCE)
                raise

    @contextlib.contextmanager
    def _running(self) -> Iterator[asyncio.AbstractEventLoop]:
        with self._lock:
            if not self._calls:
                self._start()
            assert self._loop is not None
            loop = self._loop
            self._calls += 1
        try:
            yield loop
        finally:
            with self._lock:
                self._calls -= 1
                if not self._calls:
                    self._stop()

    def _start(self) -> None:
        if self._loop is None:
            self._loop = _new_loop()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=_run, args=(self._loop, self._ending), name=THREAD, daemon=True)
        self._thread.start()

    def _stop(self) -> None:
        assert self._loop is not None and self._thread is not None
        self._ending.set()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():  # in code that does not listen; the loop stays with it
            self._loop, self._thread.name = None, f"{THREAD}, left behind"
        self._thread = None

    def close(self) -> None:
        """Ends what functions have left running in the loop, and the loop."""
        with self._lock:
            loop, self._loop = self._loop, None
            if loop is None or self._calls:
                return
            if tasks := asyncio.all_tasks(loop):
                for task in tasks:
                    task.cancel()
                _, left = loop.run_until_complete(asyncio.wait(tasks, timeout=PATIENCE))
                for task in left:  # kept for good: to collect what has caught that takes lines, or for ever
                    ctypes.pythonapi.Py_IncRef(ctypes.py_object(task))
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                loop.run_until_complete(asyncio.wait_for(loop.shutdown_asyncgens(), PATIENCE))
            loop.close()


def _new_loop() -> asyncio.AbstractEventLoop:
    # A forked process shares an epoll with its parent: to close it there would leave the parent deaf.
    if hasattr(selectors, "PollSelector"):
        return asyncio.SelectorEventLoop(selectors.PollSelector())
    return asyncio.new_event_loop()


def _run(loop: asyncio.AbstractEventLoop, ending: threading.Event) -> None:
    asyncio.set_event_loop(loop)
    while not ending.is_set():  # whatever stops the loop before, such as a function: others wait
        with contextlib.suppress(SystemExit, KeyboardInterrupt):  # of a task, which keeps it for those who await it
            loop.run_forever()


_EVENT_LOOP = _EventLoop()
run, close = _EVENT_LOOP.run, _EVENT_LOOP.close
atexit.register(close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_EVENT_LOOP.begin_anew)
