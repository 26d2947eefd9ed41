"""The mean of some seeds and how far it may be off."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # two-sided; for 1 to 9 degrees of freedom


class Mean(NamedTuple):
    """A mean with its 95% t interval, mean - half to mean + half."""

    mean: float
    half: float

    @property
    def told_apart(self) -> bool:
        """Whether the interval does not have 0."""
        return abs(self.mean) > self.half

    def text(self, digits: int) -> str:
        return f"{self.mean + 0.0:.{digits}f} ± {self.half:.{digits}f}"


def mean_of(values: Sequence[float]) -> Mean:
    """Of up to ten seeds. One alone has no interval: it is infinite."""
    if not 1 <= len(values) <= len(T_95) + 1:
        raise ValueError(f"{len(values)} seeds, expected 1 to {len(T_95) + 1}")
    if len(values) == 1:
        return Mean(values[0], float("inf"))
    return Mean(statistics.fmean(values), T_95[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5)
