"""The results of a run, as they go into JSON and come back, and the figures that are made of them.

The times of every round are kept. Medians, ratios and shares are computed from them, and only here.
"""

from __future__ import annotations

import json
import math
import shlex
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
OFF = 0.05  # relative error that is allowed there
OUTPUTS = ("--json", "--plots")  # options that name a file or folder to be written


@dataclass
class PeakGrowth:
    """Bytes by which a run raised the peak of the memory."""

    growth: int
    outputs: int  # the part of it that the run returns
    known: int  # the growth of an allocation of `KNOWN` bytes, measured in the same way

    @property
    def extra(self) -> int:
        """The growth beyond the outputs."""
        return self.growth - self.outputs

    @property
    def trusted(self) -> bool:
        """Whether the method came to the known size on a known allocation."""
        return abs(self.known - KNOWN) <= OFF * KNOWN


@dataclass
class Measured:
    """A variant: milliseconds per round, errors against float64 relative to the largest value, memory, phases."""

    name: str
    peer: str
    lacks: str
    ms: list[float]
    error: dict[str, float] = field(default_factory=dict)
    memory: PeakGrowth | None = None
    memory_note: str = ""  # why there is none
    phases: dict[str, float] = field(default_factory=dict)  # shares of one run
    graph_ms: list[float] = field(default_factory=list)  # on a GPU: the device's part, per replay of a graph of calls
    graph_note: str = ""  # why there is none

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
    """A case: its variants (ours first), its floors in the same rounds, and the absent peers with the reasons."""

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
    graph_floors: dict[str, list[float]] = field(default_factory=dict)  # as `Measured.graph_ms`

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

    def time(self, variant: Measured) -> float:
        """Milliseconds of a variant: the device's part where that was measured, else the whole call."""
        return statistics.median(variant.graph_ms or variant.ms)

    def ratio(self, variant: Measured) -> float:
        """A variant's time relative to our first variant's: the median over rounds of the ratio within a round. Of the
        device's part where both have it."""
        if variant.graph_ms and self.ours.graph_ms:
            return paired(variant.graph_ms, self.ours.graph_ms)
        return paired(variant.ms, self.ours.ms)

    def bound(self, name: str, *, graph: bool = False) -> list[float]:
        """Milliseconds of a bound in each round: the sum of its floors. ``graph``: of their device's part."""
        floors = self.graph_floors if graph else self.floors
        return [sum(parts) for parts in zip(*(floors[floor] for floor in self.bounds[name]), strict=True)]

    def share(self, variant: Measured, name: str | None = None) -> float | None:
        """A bound's time relative to a variant's, paired within rounds as ratios are. None: the first bound."""
        if not self.bounds:
            return None
        name = name or next(iter(self.bounds))
        if variant.graph_ms and all(floor in self.graph_floors for floor in self.bounds[name]):
            return paired(self.bound(name, graph=True), variant.graph_ms)
        return paired(self.bound(name), variant.ms)

    def rate(self, milliseconds: float) -> tuple[float, str] | None:
        """The case's work per second, and its unit."""
        if self.work.flops:
            return self.work.flops / milliseconds / 1e9, "TFLOP/s"
        if self.work.bytes:
            return self.work.bytes / milliseconds / 1e6, "GB/s"
        return None


@dataclass
class Sweep:
    """A case at several sizes along one axis. ``ms[variant][i]`` holds the rounds at ``points[i]``."""

    op: str
    mode: str
    axis: str
    shape: Shape
    dtype: str
    device: str
    points: list[int]
    ms: dict[str, list[list[float]]]
    memory: dict[str, list[PeakGrowth]] = field(default_factory=dict)  # per variant at every point, along rows

    @property
    def label(self) -> str:
        return f"{self.op} {self.mode} over {self.axis}, from {self.shape.name} {self.dtype} on {self.device}"

    def medians(self, variant: str) -> list[float]:
        return [statistics.median(rounds) for rounds in self.ms[variant]]

    def slope(self, variant: str) -> float:
        """The exponent with which time grows: the slope of a straight line through the logarithms."""
        return statistics.linear_regression(*_logs(self.points, self.medians(variant))).slope

    def growth(self, variant: str) -> float:
        """Time per unit at the last point relative to the first, paired within rounds: 1 where time is linear.

        Threads are no work, so along them it is the ratio of the times themselves.
        """
        first, last = self.ms[variant][0], self.ms[variant][-1]
        return paired(last, first) / (1 if self.axis == "threads" else self.points[-1] / self.points[0])


@dataclass
class BenchmarkRun:
    """All results of one call of `cmdp-fast bench`."""

    command: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    limits: dict[str, float] = field(default_factory=dict)  # of a GPU
    cases: list[CaseResult] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # cases, and why
    format: int = FORMAT
    incomplete: bool = False  # it was interrupted: the last case may have fewer rounds, and others are missing

    @property
    def measured_by(self) -> str:
        """The command that measures the same, without the options that say where its files went."""
        words, kept = iter(shlex.split(self.command)), []
        for word in words:
            if word in OUTPUTS:
                next(words, None)
            else:
                kept.append(word)
        return shlex.join(kept)

    def write(self, path: Path) -> None:
        """Writes the run as JSON, from which `read` makes it again."""
        write_json(path, asdict(self))


def read(path: Path) -> BenchmarkRun:
    """A run from its JSON. Raises InputError for any other file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise InputError(f"{path}: expected the JSON of cmdp-fast bench, format {FORMAT}")
        found["cases"] = [case_of(case) for case in found["cases"]]
        found["sweeps"] = [_sweep(sweep) for sweep in found["sweeps"]]
        return BenchmarkRun(**found)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected the JSON of cmdp-fast bench: {first_line(error)}") from error


def case_of(found: dict[str, Any]) -> CaseResult:
    """A case from its part of the JSON."""
    variants = [
        Measured(**(variant | {"memory": variant["memory"] and PeakGrowth(**variant["memory"])}))
        for variant in found["variants"]
    ]
    return CaseResult(
        **(found | {"shape": Shape(**found["shape"]), "work": Work(**found["work"]), "variants": variants})
    )


def _sweep(found: dict[str, Any]) -> Sweep:
    memory = {name: [PeakGrowth(**at) for at in points] for name, points in found["memory"].items()}
    return Sweep(**(found | {"shape": Shape(**found["shape"]), "memory": memory}))


def paired(of: Sequence[float], to: Sequence[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def _logs(points: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    return [math.log(p) for p in points], [math.log(v) for v in values]
