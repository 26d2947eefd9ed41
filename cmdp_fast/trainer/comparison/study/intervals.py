"""Means over seeds with 95 % t intervals, and how many of many differences stand a correction.

Student's t is here since nothing that is installed has its distribution function: torch has none, and scipy is no
requirement.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

CONFIDENCE = 0.95
LEAST = 3  # seeds from which a difference is told apart: the interval of two says nothing of their spread


class Interval(NamedTuple):
    """A mean and the half-width of its interval, NaN for a single value."""

    mean: float
    half: float

    @property
    def apart_from_zero(self) -> bool:
        """Whether the interval is there and does not hold 0."""
        return abs(self.mean) > self.half


def interval_of(values: Sequence[float]) -> Interval:
    """The mean of values, of which there is one or more, with its t interval of 95 %."""
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, math.nan)
    return Interval(mean, _quantile(count - 1) * statistics.stdev(values) / math.sqrt(count))


def p_value(values: Sequence[float], rounding: float = 0.0) -> float:
    """The two-sided p of the t test that the mean of two or more values is 0; 1 for those that are equal but for
    ``rounding``, from which no spread can be told: shares of some hundreds of completions are often equal."""
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    if spread <= rounding:
        return 1.0
    return 1 - share_inside(abs(mean) / spread * math.sqrt(len(values)), len(values) - 1)


def holm(p_values: Sequence[float]) -> int:
    """How many of several hypotheses Holm's method rejects, at 5 % for all of them together (Holm 1979)."""
    left = len(p_values)
    for p in sorted(p_values):
        if p * left > 1 - CONFIDENCE:
            break
        left -= 1
    return len(p_values) - left


def share_inside(t: float, degrees: int) -> float:
    """The probability that Student's t is between -t and t (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle, odd = math.atan(t / math.sqrt(degrees)), degrees % 2
    cosine, sine = math.cos(angle), math.sin(angle)
    total, term = 0.0, cosine if odd else 1.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * cosine**2
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


@lru_cache
def _quantile(degrees: int) -> float:
    """The t that `share_inside` gives 95 % for."""
    low, high = 1.0, 16.0  # 1.96 for infinitely many degrees, 12.7 for one
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if share_inside(middle, degrees) < CONFIDENCE else (low, middle)
    return low
