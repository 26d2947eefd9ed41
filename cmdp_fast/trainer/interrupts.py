"""Ctrl-C and SIGTERM: at first an end at once, during the training a request to stop after the step at hand."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """While it is entered, both signals raise KeyboardInterrupt, or set `received` where `deferred`.

    A step is not left in its middle, where nothing could be resumed. A user in a hurry repeats the signal. With
    several processes a second signal changes nothing: their launcher sends it by itself.
    """

    def __init__(self, patient: bool = False) -> None:
        self.received = False
        self.deferred = False
        self._patient = patient
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.deferred or (self.received and not self._patient):
            raise KeyboardInterrupt
        self.received = True
