"""Seconds spent in the phases of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Moment = float | torch.cuda.Event


class Clock:
    """Seconds spent in named phases; one phase may lie inside another.

    On a GPU a moment is an event in the device's stream, so that a phase is the time from when the device comes to it
    until it has done it. Nobody waits for the device before the `seconds` are asked for: waiting at both ends of a
    phase, four times in a micro-batch, would keep it idle.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self._seconds: dict[str, float] = {}
        self._open: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []  # which the device has yet to reach

    @property
    def seconds(self) -> dict[str, float]:
        """Those of each phase so far; waits for the device."""
        self.wait()
        while self._open:
            phase, since, until = self._open.pop(0)
            self._book(phase, since.elapsed_time(until) / 1000)
        return self._seconds

    def wait(self) -> float:
        """Waits for the device; the time on the host, in seconds from any beginning."""
        if self._device is not None:
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def now(self) -> Moment:
        """The moment at hand, from which `add` counts."""
        if self._device is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def add(self, phase: str, since: Moment) -> None:
        """Adds the time since then to a phase."""
        until = self.now()
        if isinstance(since, float) and isinstance(until, float):
            self._book(phase, until - since)
        else:
            self._open.append((phase, since, until))  # type: ignore[arg-type]  # both are events

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the body of a with statement."""
        since = self.now()
        try:
            yield
        finally:
            self.add(name, since)

    def _book(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
