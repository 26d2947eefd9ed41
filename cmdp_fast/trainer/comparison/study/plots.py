"""The plots of a study: regret, distribution of KL, accuracy against the budget, and the budget by kind of prompt."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cmdp_fast.files import replacing

from .intervals import Interval, interval_of
from .names import label
from .plan import TEACHER
from .statistics import SCORE, Results, Setting

MOST_PANELS = 4
CLIP = 50.0  # points: where the colours of the regret end
WITHIN, OVER = "#0072B2", "#D55E00"  # blue and vermilion of Okabe and Ito, which differ for every eye
MARKERS = "osD^v<>Pphd8X"


def draw_all(folder: Path, results: Results) -> list[str]:
    """Draws the plots that the study has figures for; returns their names."""
    if not any(results.one_setting.values()):
        return []
    plots: dict[str, Callable[[Results], Any]] = {"kl_distribution.png": kl_distribution}
    if len(results.situations) > 1:
        plots["regret.png"] = regret
    if budgets_alone(results):
        plots["frontier.png"] = frontier
    if any(line.kinds for line in results.lines):
        plots["by_kind.png"] = by_kind
    for name, plot in plots.items():
        with replacing(folder / name) as part:
            plot(results).savefig(part, format="png", dpi=130)
    return list(plots)


def regret(results: Results) -> Any:
    """Methods by situations, each with one setting: how many points behind the best, with the worst at the end."""
    rows = results.regrets(one_setting=True)
    columns = [*results.situations, "worst"]
    values = [[*(_mean(row.regrets.get(s)) for s in results.situations), row.worst] for row in rows]
    over = [
        [s in row.settings and not results.feasible(s, row.settings[s]) for s in results.situations] for row in rows
    ]
    figure = _figure(1.6 + 0.74 * len(columns), 1.6 + 0.3 * len(rows))
    axes = figure.subplots()
    cells(axes, values, columns, [_name(results, row.method) for row in rows], "YlOrBr", CLIP)
    for y, flags in enumerate(over):
        for x, flag in enumerate(flags):
            if flag:
                hatch(axes, x, y)
    axes.axvline(len(results.situations) - 0.5, color="white", lw=4)
    figure.suptitle(
        _wrapped(
            figure,
            "One setting of each method for all situations: how many points it is behind the best of each",
            f"(share right and within budget; hatched: fewer than {100 * results.study.feasible:g} % within budget)",
        ),
        fontsize=10.5,
    )
    return figure


def kl_distribution(results: Results) -> Any:
    """The cumulative KL of the completions of each method's one setting, with the budget and the mean.

    The quantiles are means over seeds; colours change at the budget.
    """
    panels = _panels(results)
    methods = [m.name for m in results.study.methods if any(results.of(s, results.one_setting[m.name]) for s in panels)]
    figure = _figure(2 + 4.6 * min(2, len(panels)), (1.3 + 0.27 * len(methods)) * math.ceil(len(panels) / 2))
    grid = figure.subplots(
        math.ceil(len(panels) / 2), min(2, len(panels)), sharex=True, sharey=True, squeeze=False
    ).flat
    for axes, situation in zip(grid, panels, strict=False):
        for y, method in enumerate(methods):
            _strip(axes, y, results, situation, results.one_setting[method])
        axes.set_yticks(range(len(methods)), [_name(results, method) for method in methods])
        axes.set_xscale("symlog", linthresh=0.1, linscale=0.5)
        axes.set_xlim(left=-0.005)
        axes.set_title(situation, fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        axes.set_xlabel("cumulative KL of a completion (nats)")
    for axes in list(grid)[len(panels) :]:
        axes.remove()
    figure.axes[0].invert_yaxis()
    figure.suptitle(
        _wrapped(
            figure,
            "The KL of completions: a mark for each twentieth of them, a diamond for the mean.",
            "Dashed: the budget. Orange: over it, and the share of completions that are.",
        ),
        fontsize=10,
    )
    return figure


def _strip(axes: Any, y: float, results: Results, situation: str, setting: Setting | None) -> None:
    lines = list(results.of(situation, setting).values())
    with_quantiles = [line.kl_quantiles for line in lines if line.kl_quantiles]
    if not with_quantiles:
        return
    quantiles = [math.fsum(each) / len(with_quantiles) for each in zip(*with_quantiles, strict=True)]
    budget = lines[0].budget
    start, end = quantiles[0], quantiles[-1]
    for left, right, colour in ((start, min(end, budget), WITHIN), (max(start, budget), end, OVER)):
        if left < right:
            axes.plot([left, right], [y, y], color=colour, lw=1)
    for quantile in quantiles:
        axes.plot(quantile, y, color=WITHIN if quantile <= budget else OVER, marker="|", ms=11, mew=2, alpha=0.8, ls="")
    mean = results.figure(situation, setting, "mean_kl")
    within = results.figure(situation, setting, "within")
    assert mean is not None and within is not None  # a line with quantiles has them
    axes.plot(mean.mean, y, marker="D", color="black", ms=4.5, ls="")
    axes.plot([budget, budget], [y - 0.5, y + 0.5], color="black", lw=1, ls="--")
    axes.annotate(
        f"{100 - 100 * within.mean:.0f} %",
        (1, y),
        (30, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=8,
        color=OVER if within.mean < results.study.feasible else "0.3",
    )


def budgets_alone(results: Results) -> bool:
    """Whether the situations differ in the budget and in nothing else."""
    situations = results.study.situations
    return len(situations) > 1 and all(set(situation.settings) == {"budget"} for situation in situations)


def frontier(results: Results) -> Any:
    """Accuracy, and right and within budget, against the budget: with one setting, and with the best of each budget."""
    several = any(len(method.candidates) > 1 for method in results.study.methods)
    figure = _figure(10.5, 3.9 * (1 + several))
    grid = figure.subplots(1 + several, 2, sharex=True, sharey=True, squeeze=False)
    for row, one_setting in zip(grid, (True, False), strict=False):
        for axes, name in zip(row, ("accuracy", SCORE), strict=True):
            for i, method in enumerate(results.study.methods):
                _curve(axes, i, results, method.name, one_setting, name)
            axes.set_title(
                f"{'accuracy' if name == 'accuracy' else 'right and within budget'}, "
                f"{'one setting' if one_setting else 'the best setting of each budget'}",
                fontsize=10,
            )
            for line in [line for (_, who), line in results.references.items() if who == TEACHER][:1]:
                axes.axhline(line.figures[name], color="black", ls=":", lw=1, label="teacher")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("budget (nats a completion)")
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize="small", title="hollow: over budget")
    return figure


def _curve(axes: Any, i: int, results: Results, method: str, one_setting: bool, name: str) -> None:
    points = []
    for situation in results.situations:
        setting = results.one_setting[method] if one_setting else results.chosen(situation, method)
        figure = results.figure(situation, setting, name)
        if setting is not None and figure is not None:
            budget = next(iter(results.of(situation, setting).values())).budget
            points.append((budget, figure, results.feasible(situation, setting)))
    points.sort()
    if not points:
        return
    colour, marker = _colour(i), MARKERS[i % len(MARKERS)]
    budgets, means = [p[0] for p in points], [p[1].mean for p in points]
    halves = [0.0 if math.isnan(p[1].half) else p[1].half for p in points]
    axes.errorbar(budgets, means, yerr=halves, color=colour, lw=1.2, capsize=2, elinewidth=0.8)
    axes.plot([], [], color=colour, marker=marker, label=method)
    for budget, figure, feasible in points:
        axes.plot(budget, figure.mean, marker=marker, ms=6, color=colour, mfc=colour if feasible else "white")


def by_kind(results: Results) -> Any:
    """The share of completions within budget, methods by kinds of prompt, each method with its one setting."""
    panels = _panels(results)
    kinds = [kind.name for kind in results.study.kinds]
    methods = [m.name for m in results.study.methods if any(results.of(s, results.one_setting[m.name]) for s in panels)]
    figure = _figure(1.8 + (0.9 * len(kinds) + 0.4) * len(panels), 1.4 + 0.28 * len(methods))
    for axes, situation in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        values = []
        for method in methods:
            lines = results.of(situation, results.one_setting[method]).values()
            by_name = {kind: [line.kinds[kind]["within"] for line in lines if kind in line.kinds] for kind in kinds}
            values.append([100 * interval_of(v).mean if v else math.nan for v in by_name.values()])
        cells(axes, values, kinds, [_name(results, method) for method in methods], "cividis", 100.0)
        axes.set_title(situation, fontsize=10)
    figure.suptitle(_wrapped(figure, "Completions within budget by kind of prompt (%)"), fontsize=10)
    return figure


# ---------------------------------------------------------------------------------------------------- parts


def _panels(results: Results) -> list[str]:
    return results.situations if len(results.situations) <= MOST_PANELS else results.situations[:1]


def _name(results: Results, method: str) -> str:
    setting = results.one_setting[method]
    return method if setting is None else label(results.study, setting)


def _mean(interval: Interval | None) -> float:
    return math.nan if interval is None else interval.mean


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    return Figure(figsize=(width, height), layout="constrained")


def _wrapped(figure: Any, *lines: str) -> str:
    """The lines of a title, broken where they are wider than the figure."""
    return "\n".join(textwrap.fill(line, round(13 * figure.get_figwidth())) for line in lines)


def cells(
    axes: Any,
    values: Sequence[Sequence[float]],
    columns: Sequence[str],
    rows: Sequence[str],
    colours: str,
    most: float,
) -> None:
    """A table of coloured cells with their numbers, from 0 to ``most``."""
    from matplotlib import colormaps

    colour_map = colormaps[colours]
    axes.imshow(values, cmap=colour_map, vmin=0, vmax=most, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if math.isnan(value):
                axes.text(x, y, "none", ha="center", va="center", fontsize=9)
                continue
            ground = colour_map(value / most)
            box = {"facecolor": ground, "edgecolor": "none", "pad": 1.5}  # in front of a hatching
            ink = "white" if sum(ground[:3]) < 1.5 else "black"
            axes.text(x, y, str(round(value)), ha="center", va="center", fontsize=9, color=ink, bbox=box)
    axes.set_xticks(range(len(columns)), [textwrap.fill(column, 9) for column in columns], fontsize=9)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks([x - 0.5 for x in range(1, len(columns))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(rows))], minor=True)
    axes.grid(which="minor", color="white", lw=1.5)
    axes.tick_params(which="minor", length=0)


def hatch(axes: Any, x: int, y: int) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="////", edgecolor="0.55", lw=0, zorder=2))


def _colour(index: int) -> str:
    """Colours of matplotlib's default cycle, and lighter ones after it."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    palette = colormaps["tab20"].colors  # type: ignore[attr-defined]
    return to_hex([*palette[::2], *palette[1::2]][index % len(palette)])
