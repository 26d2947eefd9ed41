"""What a run has found, as it goes into JSON and comes back, and the figures that are made of it.

Every round's times are kept; medians, ratios and shares are computed from them wherever they are shown, here only.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cmdp_fast.bench.case import Shape, Work
from cmdp_fast.errors import InputError, first_line
from cmdp_fast.files import write_json

FORMAT = 1
KNOWN = 64 * 2**20  # bytes of the allocation on which the method of measuring memory is tried
OFF = 0.05  # how far it may be off there


@dataclass
class Memory:
    """Bytes: what the peak grew by, how much of that is returned, and what 64 MiB came to by the same method."""

    growth: int
    outputs: int
    known: int

    @property
    def extra(self) -> int:
        return self.growth - self.outputs

    @property
    def trusted(self) -> bool:
        return abs(self.known - KNOWN) <= OFF * KNOWN


@dataclass
class Measured:
    """A variant: milliseconds a round, errors against float64 relative to the largest value, memory, phases."""

    name: str
    peer: str
    lacks: str
    ms: list[float]
    error: dict[str, float] = field(default_factory=dict)
    memory: Memory | None = None
    memory_note: str = ""  # why there is none
    phases: dict[str, float] = field(default_factory=dict)  # shares of one run

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def spread(self) -> tuple[float, float]:
        return min(self.ms), max(self.ms)

    @property
    def largest_error(self) -> float | None:
        return max(self.error.values(), default=None)


@dataclass
class CaseResult:
    """A case: its variants, ours first, its floors in the same rounds, and the peers that are absent."""

    op: str
    mode: str
    shape: Shape
    dtype: str
    device: str
    work: Work
    bounds: dict[str, list[str]]
    floors: dict[str, list[float]]
    variants: list[Measured]
    absent: dict[str, str]

    @property
    def key(self) -> tuple[str, ...]:
        return self.op, self.mode, self.shape.name, self.dtype, self.device

    @property
    def label(self) -> str:
        s = self.shape
        return f"{self.op} {self.mode}, {s.name} ({s.rows} x {s.vocab}) {self.dtype} on {self.device}"

    @property
    def ours(self) -> Measured:
        return self.variants[0]

    def ratio(self, variant: Measured) -> float:
        """A variant's time over that of our first variant: the median over rounds of the ratio within a round."""
        return paired(variant.ms, self.ours.ms)

    def bound(self, name: str) -> list[float]:
        """Milliseconds of a bound in each round: the sum of its floors."""
        return [sum(parts) for parts in zip(*(self.floors[floor] for floor in self.bounds[name]), strict=True)]

    def share(self, variant: Measured, name: str | None = None) -> float | None:
        """The part of a variant's time that a bound (None: the first) takes, paired as ratios are."""
        if not self.bounds:
            return None
        return paired(self.bound(name or next(iter(self.bounds))), variant.ms)

    def rate(self, milliseconds: float) -> tuple[float, str] | None:
        """What must be moved or computed, a second."""
        if self.work.flops:
            return self.work.flops / milliseconds / 1e9, "TFLOP/s"
        if self.work.bytes:
            return self.work.bytes / milliseconds / 1e6, "GB/s"
        return None


@dataclass
class Sweep:
    """A case at several sizes along one axis. ``ms[variant][i]`` are the rounds at ``points[i]``."""

    op: str
    mode: str
    axis: str
    shape: Shape
    dtype: str
    device: str
    points: list[int]
    ms: dict[str, list[list[float]]]
    memory: dict[str, list[Memory]] = field(default_factory=dict)  # a variant's at every point, along rows

    @property
    def label(self) -> str:
        return f"{self.op} {self.mode} over {self.axis}, from {self.shape.name} {self.dtype} on {self.device}"

    def medians(self, variant: str) -> list[float]:
        return [statistics.median(rounds) for rounds in self.ms[variant]]

    def slope(self, variant: str) -> float:
        """The exponent with which time grows: the slope of the straight line through its logarithm."""
        return statistics.linear_regression(*_logs(self.points, self.medians(variant))).slope

    def growth(self, variant: str) -> float:
        """Time at the last point over that at the first, paired within rounds; a unit, hence 1 where time is linear.

        Threads are no work: of them it is the time itself.
        """
        first, last = self.ms[variant][0], self.ms[variant][-1]
        return paired(last, first) / (1 if self.axis == "threads" else self.points[-1] / self.points[0])


@dataclass
class Run:
    """Everything that one call of `cmdp-fast bench` has found."""

    command: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    limits: dict[str, float] = field(default_factory=dict)  # of a GPU
    cases: list[CaseResult] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # cases, and why
    format: int = FORMAT

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))


def read(path: Path) -> Run:
    """A run from its JSON. Raises InputError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise InputError(f"{path}: expected the JSON of cmdp-fast bench, format {FORMAT}")
        found["cases"] = [_case(case) for case in found["cases"]]
        found["sweeps"] = [_sweep(sweep) for sweep in found["sweeps"]]
        return Run(**found)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected the JSON of cmdp-fast bench: {first_line(error)}") from error


def _case(found: dict[str, Any]) -> CaseResult:
    variants = [
        Measured(**(variant | {"memory": variant["memory"] and Memory(**variant["memory"])}))
        for variant in found["variants"]
    ]
    return CaseResult(
        **(found | {"shape": Shape(**found["shape"]), "work": Work(**found["work"]), "variants": variants})
    )


def _sweep(found: dict[str, Any]) -> Sweep:
    memory = {name: [Memory(**at) for at in points] for name, points in found["memory"].items()}
    return Sweep(**(found | {"shape": Shape(**found["shape"]), "memory": memory}))


def paired(of: Sequence[float], to: Sequence[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def _logs(points: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    return [math.log(p) for p in points], [math.log(v) for v in values]
