"""The way of each training: its reward against the cumulative KL of its completions."""

from __future__ import annotations

import io
import math
import statistics
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no display, no global state
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from .groups import Group
from .runs import Run
from .visible import short

COLOURS = (  # readable on white and on nearly black; the first six are told apart by the colour-blind (Okabe and Ito)
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    *("#8c6bb1", "#a65628", "#7f7f7f", "#bcbd22", "#e15759", "#17becf"),
)
MARKERS = "osD^v<>Pphd8X"
PARTS = 20  # a point is the mean of up to so small a part of the steps
FAR = 3.0  # budgets beyond which the axis of KL is logarithmic
POINTS = 500  # of a line
LONGEST_LABEL, MOST_LABELS, MOST_BUDGETS = 44, 24, 5
DPI = 144


class Ink(NamedTuple):
    """The colours of a figure."""

    paper: str
    text: str
    faint: str


LIGHT = Ink("#ffffff", "#1c1b1a", "#d9d6d0")
DARK = Ink("#16171a", "#e9e7e3", "#3a3b40")


def colour_of(method: int) -> str:
    """The colour of a method by its number."""
    return COLOURS[method % len(COLOURS)]


def window_of(steps: int) -> int:
    """Steps of which a point of a line is the mean."""
    return max(1, steps // PARTS)


def plot_png(groups: Sequence[Group], ink: Ink = LIGHT) -> bytes:
    """The plot as PNG: a line for each run in the colour of its method, with a mark at its end, and the budgets."""
    figure = Figure(figsize=(7.4, 4.4), layout="constrained", facecolor=ink.paper)
    axes = figure.subplots()
    handles, furthest = [], 0.0
    for number, group in enumerate(groups):
        for run in group.runs:
            kl, reward = way_of(run)
            if kl:
                _draw(axes, kl, reward, number, len(group.runs))
                furthest = max(furthest, *kl)
        if any(way_of(run)[0] for run in group.runs):
            handles.append((_key(number), short(group.label, LONGEST_LABEL)))
    budgets = sorted({run.budget for group in groups for run in group.runs if run.draws_budget})[:MOST_BUDGETS]
    for budget in budgets:
        axes.axvline(budget, color=ink.text, ls="--", lw=1)
    if budgets:
        amounts = ", ".join(f"{budget:g}" for budget in budgets)
        handles.append((Line2D([], [], color=ink.text, ls="--", lw=1), f"budget {amounts}"))
    beyond = bool(budgets) and furthest > FAR * budgets[0]
    if beyond:
        axes.set_xscale("symlog", linthresh=budgets[0])
        axes.set_xticks(_ticks(budgets[0], furthest))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    scale = f", logarithmic beyond {budgets[0]:g}" if beyond else ""
    _dress(axes, ink, f"cumulative KL of a completion (nats{scale})")
    _legend(figure, handles, ink)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a label may have characters that the font lacks
        figure.savefig(file, format="png", dpi=DPI, facecolor=ink.paper)
    return file.getvalue()


def way_of(run: Run) -> tuple[list[float], list[float]]:
    """(cumulative KL, reward) over a training: running means, of the steps that have both, at up to `POINTS` places."""
    known = [(s.cumulative_kl, s.reward) for s in run.steps if s.cumulative_kl is not None and s.reward is not None]
    window = window_of(len(known))
    last = len(known) - window
    starts = (
        sorted({round(place * last / (POINTS - 1)) for place in range(POINTS)}) if last >= POINTS else range(last + 1)
    )
    parts = [known[start : start + window] for start in starts]
    kl = [statistics.fmean(kl for kl, _ in part) for part in parts]
    return kl, [statistics.fmean(reward for _, reward in part) for part in parts]


def _ticks(budget: float, furthest: float) -> list[float]:
    """0, half of the budget, the budget, and up to seven beyond it."""
    factor = 2.0
    while math.log(budget) + 7 * math.log(factor) < math.log(furthest):
        factor *= factor if factor < 10 else 10
    beyond = [budget * factor**power for power in range(1, 8)]
    return [0.0, budget / 2, budget, *(tick for tick in beyond if tick <= furthest)]


def _draw(axes: Axes, kl: list[float], reward: list[float], number: int, seeds: int) -> None:
    colour, alpha = colour_of(number), 0.9 if seeds == 1 else 0.6
    axes.plot(kl, reward, color=colour, lw=1.5, alpha=alpha)
    axes.plot(kl[-1:], reward[-1:], MARKERS[number % len(MARKERS)], color=colour, ms=7, mec=axes.figure.get_facecolor())


def _key(number: int) -> Line2D:
    return Line2D([], [], color=colour_of(number), marker=MARKERS[number % len(MARKERS)], lw=1.5, ms=6)


def _dress(axes: Axes, ink: Ink, xlabel: str) -> None:
    axes.set(xlabel=xlabel, ylabel="reward", facecolor=ink.paper)
    axes.grid(color=ink.faint, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=ink.text, length=0)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(ink.text)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink.faint)


def _legend(figure: Figure, handles: list[tuple[Line2D, str]], ink: Ink) -> None:
    """Labels are set once they are there: they are no mathematics, and may begin with `_`."""
    left_out = len(handles) - MOST_LABELS
    shown = handles[:MOST_LABELS] + ([(Line2D([], [], ls=""), f"and {left_out} more")] if left_out > 0 else [])
    if not shown:
        return
    columns = min(len(shown), 3 if max(len(text) for _, text in shown) < 24 else 2)
    legend = figure.legend(
        [handle for handle, _ in shown],
        [str(place) for place, _ in enumerate(shown)],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize="small",
    )
    for label, (_, text) in zip(legend.get_texts(), shown, strict=True):
        label.set_parse_math(False)
        label.set_text(text)
        label.set_color(ink.text)
