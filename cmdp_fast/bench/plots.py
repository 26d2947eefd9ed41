"""PNG plots of runs: rates against the roofline, ratios to the peers, memory against rows, scaling."""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cmdp_fast.bench.results import BenchmarkRun, CaseResult, Sweep
from cmdp_fast.bench.show import MIB

NOTHING = 0.01  # MiB
PREFIXES = ("rates.", "ratios.", "sweep-", "memory-")  # of the file names


def draw(runs: Sequence[BenchmarkRun], folder: Path) -> list[Path]:
    """Draws every plot that the runs have figures for. A file appears whole or not at all."""
    cases = [case for run in runs for case in run.cases]
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    moved = [case for case in cases if case.work.bytes or case.work.flops]
    if moved:
        drawn.append(_save(folder / "rates.png", lambda figure: _rates(figure, moved), len(moved)))
    compared = [case for case in cases if len(case.variants) > 1]
    if compared:
        drawn.append(_save(folder / "ratios.png", lambda figure: _ratios(figure, compared), len(compared)))
    for sweep in (sweep for run in runs for sweep in run.sweeps):
        name = f"{sweep.op}-{sweep.mode}-{sweep.axis}-{sweep.dtype}.png".replace(" ", "-")
        if len(sweep.points) > 1:
            drawn.append(_save(folder / f"sweep-{name}", functools.partial(_sweep, sweep=sweep), 12))
        if sweep.memory:
            drawn.append(_save(folder / f"memory-{name}", functools.partial(_memory, sweep=sweep), 12))
    return drawn


def _save(path: Path, paint: Callable[[Any], None], lines: int) -> Path:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(9, max(3.5, 1.5 + 0.35 * lines)), layout="constrained")
    paint(figure)
    part = path.with_name(f".{path.name}")
    figure.savefig(part, format="png", dpi=120)
    os.replace(part, path)
    return path


def _short(case: CaseResult) -> str:
    return f"{case.op} {case.mode}\n{case.shape.name} {case.dtype}"


def _rates(figure: Any, cases: list[CaseResult]) -> None:
    """The work per second of our variant, and that of its floors in the same rounds."""
    units = sorted({rate[1] for case in cases if (rate := case.rate(1.0))})
    for axes, unit in zip(figure.subplots(1, len(units), squeeze=False)[0], units, strict=True):
        some = [case for case in cases if (rate := case.rate(1.0)) and rate[1] == unit]
        axes.barh(range(len(some)), [_rate(case, case.ours.median) for case in some], color="tab:blue", label="ours")
        limits = [
            (_rate(case, statistics.median(case.bound(next(iter(case.bounds))))), i) for i, case in _bounded(some)
        ]
        if limits:
            label = "floor, measured in the same rounds"
            axes.plot(*zip(*limits, strict=True), "|", color="black", ms=14, mew=2, label=label)
        axes.set_yticks(range(len(some)), [_short(case) for case in some], fontsize=7)
        axes.invert_yaxis()
        axes.set(xlabel=unit, title="what must be moved or computed, a second", xlim=(0, None))
        axes.legend(fontsize=7)


def _rate(case: CaseResult, milliseconds: float) -> float:
    rate = case.rate(milliseconds)
    assert rate is not None  # of the cases drawn here
    return rate[0]


def _bounded(cases: list[CaseResult]) -> list[tuple[int, CaseResult]]:
    return [(i, case) for i, case in enumerate(cases) if case.bounds]


def _ratios(figure: Any, cases: list[CaseResult]) -> None:
    """Each variant's time relative to that of our first variant."""
    axes = figure.subplots()
    names = list(dict.fromkeys(v.name for case in cases for v in case.variants[1:]))
    for name in names:
        points = [(case.ratio(v), i) for i, case in enumerate(cases) for v in case.variants[1:] if v.name == name]
        axes.plot(*zip(*points, strict=True), "o", ms=5, label=name)
    axes.axvline(1.0, color="black", lw=1)
    axes.set_yticks(range(len(cases)), [_short(case) for case in cases], fontsize=7)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="time over ours (right of the line: slower)")
    for axis_of in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        axis_of(lambda ratio, _: f"{ratio:g}")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _memory(figure: Any, sweep: Sweep) -> None:
    """Extra memory over the axis. 0 has no logarithm and is drawn as `NOTHING`."""
    axes = figure.subplots()
    for name, memory in sweep.memory.items():
        axes.plot(sweep.points, [max(m.extra / MIB, NOTHING) for m in memory], "o-", ms=4, lw=1, label=name)
    axes.set(xscale="log", yscale="log", xlabel=sweep.axis, ylabel="MiB beyond the outputs", title=sweep.label)
    axes.legend(fontsize=7)


def _sweep(figure: Any, sweep: Sweep) -> None:
    """Time over the axis, both logarithmic; a slope of 1 is linear growth."""
    axes = figure.subplots()
    for name in sweep.ms:
        label = f"{name}: slope {sweep.slope(name):.2f}"
        axes.plot(sweep.points, sweep.medians(name), "o-", ms=4, lw=1, label=label)
    axes.set(xscale="log", yscale="log", xlabel=sweep.axis, ylabel="ms", title=sweep.label)
    axes.legend(fontsize=7)
