"""Ctrl-C and SIGTERM: at first an end at once, during the training a request to stop after the step at hand."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

PENDING = "stopping (again: at once)"  # short, so that a line of 40 columns has it whole
AGAIN = {signal.SIGINT: "press again to stop now", signal.SIGTERM: "a second signal stops it now"}


class Interrupts:
    """While it is entered, both signals raise KeyboardInterrupt, or set `received` where `deferred`, which the `note`
    is told.

    A step is not left in its middle, where nothing could be resumed. A user in a hurry repeats the signal, and is
    `hurried`: nothing that takes long is begun any more. With several processes a second signal changes nothing: their
    launcher sends it by itself.

    The first signal is answered at once, with a line on stderr that says what it `waits` for. Of several processes one
    is `heard`.
    """

    def __init__(self, patient: bool = False, note: Callable[[str], None] | None = None, heard: bool = True) -> None:
        self.received = False
        self.deferred = False
        self.hurried = False
        self.waits = ""
        self._patient, self._note, self._heard = patient, note, heard
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as of what a script has put into the background
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, again = not self.received, self.received and not self._patient
        self.received, self.hurried = True, self.hurried or again
        if first or again:
            self._answer(number, again)
        if not self.deferred or again:
            raise KeyboardInterrupt
        if self._note is not None:
            self._note(PENDING)

    def _answer(self, number: int, again: bool) -> None:
        """Says what a signal has led to, past Python's streams, which may be at work in the moment of the signal."""
        parts = [] if again or not self.waits else [self.waits]
        if parts and not self._patient:
            parts.append(AGAIN[signal.Signals(number)])
        line = f"cmdp-fast: {'; '.join(parts) or 'stopping'}\n"
        with suppress(OSError):  # closed, or a pipe that nobody reads
            if self._heard:
                # A terminal may show a bar in this line, and ^C: the bar is drawn anew below
                os.write(2, (f"\r\x1b[2K{line}" if os.isatty(2) else line).encode())
