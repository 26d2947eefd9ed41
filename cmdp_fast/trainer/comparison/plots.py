"""The plots of a comparison: bars, accuracy against cumulative KL, accuracy against the budget."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .table import COLUMNS, TableRow, title

BARS = (
    *("accuracy", "constraint_satisfaction", "correct_and_feasible"),
    *("reasoning_success", "mean_cumulative_kl", "mean_length"),
)
MARKERS = "osD^v<>Pphd8X"


def plot_bars(path: Path, rows: Sequence[TableRow]) -> None:
    """A panel per figure, a bar per method with its standard error; teacher and student before among them."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    panels = [c for c in COLUMNS if c.name in BARS and any(c.name in row.figures for row in rows)]
    panels.sort(key=lambda c: BARS.index(c.name))
    wide = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(4.2 * wide + 1.5, 2 * (1 + 0.24 * len(rows))), layout="constrained")
    grid = figure.subplots(2, wide, sharey=True, squeeze=False).flat
    untrained = _untrained(rows)
    colours = [*("0.35", "0.65")[2 - untrained :], *(_colour(i) for i in range(len(rows) - untrained))]
    for axes, column in zip(grid, panels, strict=False):
        for place, row in enumerate(rows):
            if column.name in row.figures:
                mean, error = row.figures[column.name]
                axes.barh(place, mean, xerr=None if math.isnan(error) else error, color=colours[place], capsize=2)
        if column.share:
            axes.set_xlim(0, 1)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_title(title(column).replace(" (%)", ""))
        axes.grid(axis="x", alpha=0.3)
    for axes in list(grid)[len(panels) :]:
        axes.remove()
    figure.axes[0].invert_yaxis()
    _save(figure, path)


def plot_pareto(path: Path, rows: Sequence[TableRow]) -> None:
    """Accuracy against cumulative KL, a marker per method, the sweep of a soft multiplier joined to a curve.

    Names stand in a legend, where they cannot cover one another. The axis of KL is linear near 0, where the teacher is,
    and logarithmic beyond.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 5.5), layout="constrained")
    axes = figure.subplots()
    budget = rows[0].config.budget
    if rows[0].config.cost == "reverse_kl" and not rows[0].config.budget_per_token:
        axes.axvline(budget, color="black", ls="--", lw=1, label=f"budget {budget:g}")
    for curve in sweeps(rows, "coefficient", lambda row: row.config.kind == "lagrangian"):
        axes.plot(
            *([row.figures[n].mean for row in curve] for n in ("mean_cumulative_kl", "accuracy")), "-", color="0.7"
        )
    untrained = _untrained(rows)
    for i, row in enumerate(rows):
        (x, dx), (y, dy) = (row.figures[name] for name in ("mean_cumulative_kl", "accuracy"))
        colour, marker = _colour(i - untrained), MARKERS[(i - untrained) % len(MARKERS)]
        if row.variant is None:
            colour, marker = "black", "*" if row.label == "teacher" else "x"
        axes.errorbar(
            x,
            y,
            xerr=None if math.isnan(dx) else dx,
            yerr=None if math.isnan(dy) else dy,
            color=colour,
            marker=marker,
            ls="",
            ms=7,
            alpha=0.85,
            capsize=2,
            label=row.label,
        )
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlim(left=-0.01)
    axes.set(xlabel="cumulative KL (nats a completion)", ylabel="accuracy")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    _save(figure, path)


def plot_budgets(path: Path, rows: Sequence[TableRow]) -> bool:
    """Accuracy, satisfaction and KL against the budget for every method that was run with several.

    Returns whether there was one; without it nothing is written.
    """
    from matplotlib.figure import Figure

    curves = sweeps(rows, "budget", lambda row: True)
    if not curves:
        return False
    figure = Figure(figsize=(13, 4), layout="constrained")
    names = ("accuracy", "constraint_satisfaction", "mean_cumulative_kl")
    for axes, name in zip(figure.subplots(1, 3), names, strict=True):
        column = next(c for c in COLUMNS if c.name == name)
        for curve in curves:
            estimates = [row.figures[name] for row in curve]
            errors = [0.0 if math.isnan(e.error) else e.error for e in estimates]
            budgets = [row.config.budget for row in curve]
            axes.errorbar(
                budgets, [e.mean for e in estimates], yerr=errors, marker="o", capsize=2, label=_name(curve, "budget")
            )
        if name == "mean_cumulative_kl":
            budgets = sorted({row.config.budget for curve in curves for row in curve})
            axes.plot(budgets, budgets, color="black", ls="--", lw=1, label="budget")
        elif rows[0].label == "teacher":
            axes.axhline(rows[0].figures[name].mean, color="black", ls=":", lw=1, label="teacher")
        axes.set(title=title(column).replace(" (%)", ""), xlabel="budget d (nats)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    _save(figure, path)
    return True


def sweeps(rows: Sequence[TableRow], setting: str, wanted: Callable[[TableRow], bool]) -> list[list[TableRow]]:
    """The rows that differ in one setting alone, several of a kind, by its value."""
    groups: dict[tuple[str, str], list[TableRow]] = {}
    for row in rows:
        if row.variant is not None and wanted(row):
            others = {key: value for key, value in row.variant.overrides.items() if key != setting}
            groups.setdefault((row.variant.method, repr(sorted(others.items()))), []).append(row)
    ordered = [sorted(group, key=lambda row: getattr(row.config, setting)) for group in groups.values()]
    return [group for group in ordered if len({getattr(row.config, setting) for row in group}) > 1]


def _untrained(rows: Sequence[TableRow]) -> int:
    """The rows before those of the methods: one where the teacher is asked."""
    return sum(row.variant is None for row in rows)


def _name(curve: Sequence[TableRow], setting: str) -> str:
    """The common part of the rows of a sweep over a setting."""
    variant = curve[0].variant
    assert variant is not None
    others = ",".join(f"{key}={value}" for key, value in variant.overrides.items() if key != setting)
    return ":".join([Path(variant.method).stem, *([others] if others else [])])


def _colour(index: int) -> str:
    """Colours of matplotlib's default cycle, and lighter ones after it."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    palette = colormaps["tab20"].colors  # type: ignore[attr-defined]
    return to_hex([*palette[::2], *palette[1::2]][index % len(palette)])


def _save(figure: Any, path: Path) -> None:
    part = path.with_name(f".{path.name}")
    figure.savefig(part, format="png", dpi=120)
    os.replace(part, path)
