"""The event loop in which plain code calls the user's coroutine functions.

It is the same one for all calls of this process: a client that such a function keeps, for a judge on a server say,
belongs to the loop that it was first used in. A call in the main thread runs it there, where signals are heard: nothing
else ends code that does not return, such as a search by `re`. Where the main thread runs a loop of its own already, or
calls come from other threads, a thread runs it while calls last, many at once, and ends with the last of them. A forked
process begins anew, as its parent's thread is not in it.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import selectors
import threading
import traceback
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
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
        running = asyncio._get_running_loop()
        if running is not None and running is self._loop:
            raise RuntimeError("a coroutine function was called by plain code that another one called; await it there")
        with self._called(running is None) as (loop, here):
            return _run_here(loop, make()) if here else _run_there(loop, make)

    @contextmanager
    def _called(self, free: bool) -> Iterator[tuple[asyncio.AbstractEventLoop, bool]]:
        """The loop, and whether the caller has to run it, who is ``free`` to; else a thread does, or the main thread in
        a call of its own."""
        with self._lock:
            self._loop = loop = self._loop or _new_loop()
            here = free and not self._calls and threading.current_thread() is threading.main_thread()
            if not here and not self._calls:
                self._start()
            self._calls += 1
        try:
            yield loop, here
        finally:
            with self._lock:
                self._calls -= 1
                if here and self._calls:  # others have come meanwhile
                    self._start()
                elif not here and not self._calls:
                    self._stop()

    def _start(self) -> None:
        assert self._loop is not None
        self._thread = threading.Thread(target=_run, args=(self._loop,), name=THREAD, daemon=True)
        self._thread.start()

    def _stop(self) -> None:
        assert self._loop is not None and self._thread is not None
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():  # in code that does not listen; the loop stays with it
            self._loop = None
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
                loop.run_until_complete(asyncio.wait(tasks, timeout=PATIENCE))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()


def _new_loop() -> asyncio.AbstractEventLoop:
    # A forked process shares an epoll with its parent: to close it there would leave the parent deaf.
    if hasattr(selectors, "PollSelector"):
        return asyncio.SelectorEventLoop(selectors.PollSelector())
    return asyncio.new_event_loop()


def _run_here(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> T:
    task = loop.create_task(coroutine)
    while True:
        try:
            return loop.run_until_complete(task)
        except BaseException as error:
            if task.done():
                raise
            if not (isinstance(error, SystemExit) and _is_of_a_task(error)):
                task.cancel()
                loop.run_until_complete(asyncio.wait([task], timeout=PATIENCE))
                raise


def _is_of_a_task(error: BaseException) -> bool:
    """Whether an exception that has ended a loop was raised in what the loop has called: then those who await it get it
    too."""
    return any(frame.f_code is asyncio.Handle._run.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))


def _run_there(loop: asyncio.AbstractEventLoop, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    ended = threading.Event()

    async def until_ended() -> T:
        try:
            return await make()
        finally:
            ended.set()

    future = asyncio.run_coroutine_threadsafe(until_ended(), loop)
    try:
        return future.result()
    except BaseException:
        if future.cancel():  # it was the caller who was interrupted
            ended.wait(PATIENCE)
        raise


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    while True:
        try:
            return loop.run_forever()
        except (SystemExit, KeyboardInterrupt):  # of a task, which keeps it for those who await it; others go on
            pass


_EVENT_LOOP = _EventLoop()
run = _EVENT_LOOP.run
atexit.register(_EVENT_LOOP.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_EVENT_LOOP.begin_anew)
