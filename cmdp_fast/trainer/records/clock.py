"""Seconds spent in the phases of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds spent in named phases. On a GPU it waits for the device at both ends of a phase."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    def now(self) -> float:
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def add(self, phase: str, since: float) -> None:
        """Adds the time since then to a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self.now() - since

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the body of a with statement."""
        since = self.now()
        try:
            yield
        finally:
            self.add(name, since)
