"""Calls of the user's own functions that do not return, or have had their time; and the end of what is somebody
else's."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

from cmdp_fast import event_loop
from cmdp_fast.cpu import native
from cmdp_fast.errors import InputError
from cmdp_fast.own_code import is_installed

NOTICE = 60.0  # seconds after which it is said what is waited for; again after twice as many, and so on
GRACE = 60.0  # seconds that a call which has had its time may take to clean up
BEAT = 5.0  # seconds that the watching thread sleeps at most; one that has slept twice as many was stopped meanwhile
# What ends a call in the main thread, in Python or in C that waits: a signal that does nothing where nobody hears it.
# SIGALRM belongs to the functions, many of which limit their own time by it.
INTERRUPT = getattr(signal, "SIGURG", None) if hasattr(signal, "pthread_kill") else None
# And in C that computes and lets no other thread have Python's lock, as `re` does, but looks for signals: one that the
# processor's time brings, which a few ticks in turn have to find that the watching thread gets no turn.
TICK, TICKS = 5.0, 3  # seconds of all of the process's threads
SPARE = 20.0  # seconds by which all of this has to have happened, or nobody of Python gets a turn
WATCH = "cmdp_fast watches calls"  # the name of the thread that says it

_log = logging.getLogger(__name__)


class Limit(NamedTuple):
    """The seconds that a call may take, and the option, or else what it is, that says so."""

    seconds: float
    option: str


class Overdue(BaseException):
    """Raised once inside of a call that has had its time, with what is said of it; no Exception, since many a function
    takes those for a result. Who calls is told by an InputError, but for one that comes as the call ends by itself."""


@contextlib.contextmanager
def told_of(what: str, thread: str = "", limit: Limit | None = None) -> Iterator[None]:
    """Says so if the body has not ended after `NOTICE` seconds, and rarely from then on, and at which line it is: in
    this thread, or in that of a name.

    Without a limit it is waited for all the same. At the limit Overdue is raised in a body in the main thread, and
    whatever comes of that is an InputError, the result of a body that has caught it too. A body that has not ended
    `GRACE` seconds later is in C that does not listen, or has caught it and goes on. Then, and in another thread at the
    limit, the line is said and the process is ended with exit code 2, as if it had been killed: no thread can be ended
    from outside. C that keeps Python's lock for ever and looks for no signal, as a search by `re` does in a thread
    other than the main one, such as that of coroutine functions, lets nobody of Python say anything: a thread of the
    native module does, `SPARE` seconds after that. Time in which the process is stopped does not count.

    The handlers of SIGURG and SIGVTALRM that this takes stay, and do nothing without a call that is late. Where the
    process has others it goes without: a body is then ended with the process.
    """
    main = limit is not None and threading.current_thread() is threading.main_thread()
    hears = main and INTERRUPT is not None and _is_ours(INTERRUPT, _heard)
    call = _Call(what, thread, threading.get_ident(), limit, hears, time.monotonic(), NOTICE)
    ticks = main and _begin_ticks()
    error: BaseException | None = None
    last = None
    try:
        try:
            _watch.begin(call)
            last = _last_resort(what, limit)
            yield
        except BaseException as raised:
            error = raised
            if not call.late or isinstance(raised, (KeyboardInterrupt, GeneratorExit)):
                raise
        finally:
            call.over = True
    finally:  # of all of it, wherever Overdue or Ctrl-C comes: what stays would end somebody else
        call.over = True
        try:
            _watch.end(call)
        finally:
            try:
                if last:
                    last.call_off()
            finally:
                if ticks:
                    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    if call.late:
        global _given_up
        _given_up = True
        raise InputError(call.late) from error


def end_in_time(code: int) -> bool:
    """For a program that is about to end: what a call that was given up has left running, such as threads that are
    waited for, has `GRACE` seconds until the process is ended with this exit code. Whether there was such a call."""
    if _given_up:
        with contextlib.suppress(RuntimeError):  # no room for a thread
            if native is not None and hasattr(native, "end_in"):
                native.end_in(GRACE, code)
            else:
                timer = threading.Timer(GRACE, os._exit, [code])
                timer.daemon = True
                timer.start()
    return _given_up


def _close_in_time() -> None:
    """The end of what coroutine functions have left running in their loop. They may do anything as they are
    cancelled."""
    what = "cmdp-fast: error: what coroutine functions have left running"
    deadline = None
    if native is not None and hasattr(native, "Deadline"):
        with contextlib.suppress(RuntimeError):  # no room for a thread
            line = f"{what} has not ended for {GRACE:g} s, and the process is ended\n"
            deadline = native.Deadline(GRACE, line.encode(), 2)
    event_loop.close()
    if deadline:
        deadline.call_off()


atexit.register(_close_in_time)  # before event_loop's own, which then finds nothing


def _last_resort(what: str, limit: Limit | None) -> Any:
    if limit is None or native is None or not hasattr(native, "Deadline"):
        return None
    line = _ended(f"{_late(what, limit.seconds)}, and is given up ({limit.option})")
    with contextlib.suppress(RuntimeError):  # no room for a thread
        return native.Deadline(limit.seconds + GRACE + SPARE, line, 2)


def _late(what: str, seconds: float) -> str:
    return f"{what} has not returned for {seconds:g} s"


def _ended(late: str) -> bytes:
    """What is said of a call with which the process is ended."""
    return f"cmdp-fast: error: {late}: it does not listen, and the process is ended\n".encode(errors="replace")


def _is_ours(number: int, handler: Callable[[int, FrameType | None], None]) -> bool:
    """Takes a signal that nobody has; whether this has it."""
    given = signal.getsignal(number)
    if given is not handler:
        if given not in (signal.SIG_DFL, signal.SIG_IGN) or _is_caught(number):
            return False
        signal.signal(number, handler)
    return True


def _is_caught(number: int) -> bool:
    """Whether there is a handler of C code, such as Go's of SIGURG, of which Python knows nothing."""
    with contextlib.suppress(OSError, ValueError, StopIteration), open("/proc/self/status", encoding="ascii") as status:
        caught = next(line for line in status if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
    return False


def _begin_ticks() -> bool:
    """Has the processor's time be heard of; not where somebody else does."""
    if not hasattr(signal, "setitimer") or not _is_ours(signal.SIGVTALRM, _ticked):
        return False
    if signal.getitimer(signal.ITIMER_VIRTUAL)[0]:  # of a call around this one
        return False
    signal.siginterrupt(signal.SIGVTALRM, False)
    signal.setitimer(signal.ITIMER_VIRTUAL, TICK, TICK)
    return True


def _ticked(number: int, frame: FrameType | None) -> None:
    _watch.look_for(threading.get_ident())
    _heard(number, frame)


def _heard(number: int, frame: FrameType | None) -> None:
    if call := _watch.late(threading.get_ident()):
        call.told = True
        raise Overdue(call.late)


@dataclass(eq=False)
class _Call:
    what: str
    thread: str  # "": the caller's
    caller: int
    limit: Limit | None
    hears: bool  # whether a signal interrupts it
    begun: float
    after: float  # seconds, until it is looked at
    late: str = ""  # what is said of it once it has had its time
    told: bool = False  # Overdue was raised in it
    over: bool = False
    unseen: int = 0  # ticks that have found it due

    def __post_init__(self) -> None:
        self.after = min(self.after, self.most)

    @property
    def most(self) -> float:
        return math.inf if self.limit is None else self.limit.seconds

    @property
    def due(self) -> float:
        return self.begun + self.after

    def look(self) -> None:
        """Says that it has not returned; at its limit has it end, and later ends the process."""
        said = f"{_late(self.what, self.after)}{self._place()}"
        self.unseen = 0
        if self.after < self.most:
            self.after = min(2 * self.after, self.most)
            return _log.warning("%s", said)
        assert self.limit is not None
        if self.late or not self.hears:
            late = self.late or f"{said}, and is given up ({self.limit.option})"
            with contextlib.suppress(OSError, ValueError):
                if select.select((), (2,), (), 1.0)[1]:  # nobody may read it, and then it would block
                    os.write(2, _ended(late))
            os._exit(2)
        self.late = f"{said}, and is given up ({self.limit.option})"
        self.after += GRACE
        if INTERRUPT is not None:
            signal.pthread_kill(self.caller, INTERRUPT)

    def _place(self) -> str:
        ident = next((each.ident for each in threading.enumerate() if each.name == self.thread), self.caller)
        frame = sys._current_frames().get(ident or self.caller)
        places = ((each.f_code.co_filename, line) for each, line in traceback.walk_stack(frame)) if frame else iter(())
        return next((f", it is at {file}:{line}" for file, line in places if not is_installed(file)), "")


class _Watch:
    """One thread for all calls: to start one for each takes longer than most functions do."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls: set[_Call] = set()
        self._next = 0.0  # when the thread looks again; 0: none runs
        self._expected = 0.0  # when it comes to look at the latest, unless the process is stopped
        self._used = 0.0  # the processor's time until then, which a process that is stopped does not use

    def begin(self, call: _Call) -> None:
        with self._changed:
            self._calls.add(call)
            if not self._next:
                self._expected, self._used = time.monotonic(), time.process_time()
                # Where no more threads can be started it is not watched, and made all the same
                with contextlib.suppress(RuntimeError):
                    threading.Thread(target=self._look, name=WATCH, daemon=True).start()
                    self._next = call.due
            elif call.due < self._next:
                self._changed.notify()

    def end(self, call: _Call) -> None:
        with self._changed:
            self._calls.discard(call)

    def late(self, caller: int) -> _Call | None:
        """A call of a thread's that has had its time, is not over and was not told. Asked inside of a signal: no
        lock."""
        return next((c for c in list(self._calls) if c.caller == caller and c.late and not (c.over or c.told)), None)

    def look_for(self, caller: int) -> None:
        """Looks at the calls of a thread in place of the thread that watches, where that gets no turn. Asked inside of
        a signal."""
        for call in list(self._calls):
            if call.caller == caller and not call.over and call.due <= time.monotonic():
                call.unseen += 1
                if call.unseen >= TICKS:
                    with contextlib.suppress(Exception):
                        call.look()

    def _look(self) -> None:
        while True:
            with self._changed:
                now, used = time.monotonic(), time.process_time()
                if (stopped := now - self._expected - (used - self._used)) > BEAT:
                    for call in self._calls:
                        call.begun += stopped
                self._expected, self._used = now, used
                waited = [call for call in self._calls if not call.over]
                late = [call for call in waited if call.due <= now]
                if not late:
                    # With no call it looks again as late as the next one could be due
                    self._next = min((call.due for call in waited), default=now + NOTICE)
                    slept = min(self._next - now, BEAT if self._calls else NOTICE)
                    self._expected += slept
                    self._changed.wait(slept)
                for call in late:
                    if call.after >= call.most:  # it must not end before it is interrupted
                        with contextlib.suppress(Exception):
                            call.look()
            for call in late:
                if call.after < call.most:
                    with contextlib.suppress(Exception):  # of a log's handler: others are watched all the same
                        call.look()


_watch = _Watch()
_given_up = False  # whether a call was


def _watch_anew() -> None:
    """A fork has none of its parent's threads, and perhaps a lock that one of them held."""
    global _watch
    _watch = _Watch()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_watch_anew)
