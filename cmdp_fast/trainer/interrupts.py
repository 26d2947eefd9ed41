"""Ctrl-C and SIGTERM: at first an end at once, during the training a request to stop after the step at hand."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

PENDING = "stopping (again: at once)"  # short, so that a line of 40 columns has it whole


class Interrupts:
    """While it is entered, both signals raise KeyboardInterrupt, or set `received` where `deferred`, which the `note`
    is told.

    A step is not left in its middle, where nothing could be resumed. A user in a hurry repeats the signal, and is
    `hurried`: nothing that takes long is begun any more. With several processes a second signal changes nothing: their
    launcher sends it by itself.
    """

    def __init__(self, patient: bool = False, note: Callable[[str], None] | None = None) -> None:
        self.received = False
        self.deferred = False
        self.hurried = False
        self._patient, self._note = patient, note
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
        again = self.received and not self._patient
        self.received, self.hurried = True, self.hurried or again
        if not self.deferred or again:
            raise KeyboardInterrupt
        if self._note is not None:
            self._note(PENDING)
