"""Calls of the user's own functions: what they raise in one line, with the place, and that one does not return; and the
end of what is somebody else's."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

from cmdp_fast.errors import InputError, first_line, readable

NOTICE = 60.0  # seconds after which it is said what is waited for
WATCH = "cmdp_fast watches calls"  # the name of the thread that says it

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def errors_named(what: str, function: Any) -> Iterator[None]:
    """An exception of a function's own in the body becomes an InputError of one line, with the exception as its cause;
    ``what`` says whose it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {readable(str(error))}") from error
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        raise InputError(f"{what} raised {described(error, function)}") from error


def described(error: BaseException, function: Any = None) -> str:
    """The kind of an error, the first line of its message, which may quote a completion, and where it was raised:
    ``LookupError: no such judge (mine.py:12)``.

    That is the last line of code that was not installed, else of the function's own file, else where the function
    begins: it could not be called.
    """
    definition: CodeType | None = getattr(_plain(function), "__code__", None)
    own = definition and definition.co_filename
    passed = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    places = [place for place in passed if not _is_installed(place[0])]
    places = places or [place for place in passed if place[0] == own]
    if definition and not places:
        places = [(definition.co_filename, definition.co_firstlineno)]
    return f"{type(error).__name__}: {readable(first_line(error))}" + (
        f" ({places[-1][0]}:{places[-1][1]})" if places else ""
    )


@contextlib.contextmanager
def told_of(what: str, thread: str = "") -> Iterator[None]:
    """Says so if the body has not ended after `NOTICE` seconds, and at which line it is: in this thread, or in that of
    a name.

    It is waited for all the same: no thread can be ended from outside, and one that was left behind would go on.
    """
    call = _Call(what, thread, threading.get_ident(), time.monotonic() + NOTICE)
    _watch.begin(call)
    try:
        yield
    finally:
        _watch.end(call)


class TooLong(Exception):
    """Raised inside of code that has had its time; the code may catch it, and then goes on."""


@contextlib.contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """Raises TooLong in the body, wherever it is in Python, once it has had its time: for programs that are no user's
    own, such as a chat template. What does not come back from C is waited for."""
    caller, lock, over, sent = ctypes.c_ulong(threading.get_ident()), threading.Lock(), False, False

    def end() -> None:
        nonlocal sent
        with lock:
            if not over:
                sent = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(caller, ctypes.py_object(TooLong))

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            over = True
            if sent:  # and perhaps not raised yet
                ctypes.pythonapi.PyThreadState_SetAsyncExc(caller, None)


@dataclass(eq=False)
class _Call:
    what: str
    thread: str  # "": the caller's
    caller: int
    due: float  # when it is told of

    def tell(self) -> None:
        ident = next((each.ident for each in threading.enumerate() if each.name == self.thread), self.caller)
        frame = sys._current_frames().get(ident or self.caller)
        places = ((each.f_code.co_filename, line) for each, line in traceback.walk_stack(frame)) if frame else iter(())
        place = next((f", it is at {file}:{line}" for file, line in places if not _is_installed(file)), "")
        _log.warning("%s has not returned for %g s%s", self.what, NOTICE, place)


class _Watch:
    """One thread for all calls: to start one for each takes longer than most functions do."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls: set[_Call] = set()
        self._next = 0.0  # when the thread looks again; 0: none runs

    def begin(self, call: _Call) -> None:
        with self._changed:
            self._calls.add(call)
            if not self._next:
                # Where no more threads can be started it is not watched, and made all the same
                with contextlib.suppress(RuntimeError):
                    threading.Thread(target=self._look, name=WATCH, daemon=True).start()
                    self._next = call.due
            elif call.due < self._next:
                self._changed.notify()

    def end(self, call: _Call) -> None:
        with self._changed:
            self._calls.discard(call)

    def _look(self) -> None:
        while True:
            with self._changed:
                now = time.monotonic()
                late = [call for call in self._calls if call.due <= now]
                self._calls.difference_update(late)
                if not late:
                    # With no call it looks again as late as the next one could be due
                    self._next = min((call.due for call in self._calls), default=now + NOTICE)
                    self._changed.wait(self._next - now)
            for call in late:
                with contextlib.suppress(Exception):  # of a log's handler: the next calls are watched all the same
                    call.tell()


_watch = _Watch()


def _watch_anew() -> None:
    """A fork has none of its parent's threads, and perhaps a lock that one of them held."""
    global _watch
    _watch = _Watch()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_watch_anew)


def _plain(function: Any) -> Any:
    """The function in a partial, or that of a method or of an object's ``__call__``."""
    while isinstance(function, functools.partial):
        function = function.func
    function = function if hasattr(function, "__code__") else getattr(function, "__call__", None)  # noqa: B004
    return getattr(function, "__func__", function)


def _is_installed(file: str) -> bool:
    """Whether a file is this package's, Python's, an installed package's, or none."""
    return file.startswith(("<", *_INSTALLED))


_INSTALLED = tuple(
    os.path.join(folder, "")
    for folder in {*map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")), os.path.dirname(__file__)}
)
