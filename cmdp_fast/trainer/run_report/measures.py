"""The table of measures: a row for the student before, the teacher and each method, means over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..comparison.study.intervals import Interval, interval_of
from .groups import Group
from .runs import Figures, Run

_PLAIN = 1e6  # from here on a number has an exponent


class Column(NamedTuple):
    """A measure: its name here, its title with the unit, its digits, and whether it is a share, shown in per cent."""

    name: str
    title: str
    digits: int
    share: bool = False


COLUMNS = (
    Column("reward", "reward", 3),
    Column("reward_in_training", "reward in training", 3),
    Column("constraint_satisfaction", "within budget, %", 1, share=True),
    Column("certified", "proven within budget, %", 1, share=True),
    Column("mean_cumulative_kl", "cumulative KL, nats", 2),
    Column("teacher_perplexity", "perplexity under the teacher", 2),
    Column("distinct_2", "distinct-2, %", 1, share=True),
    Column("repetition_4", "repetition, %", 1, share=True),
    Column("ended", "ended by itself, %", 1, share=True),
    Column("mean_length", "length, tokens", 1),
)


@dataclass(frozen=True)
class Row:
    """A line of the table. `method` is the number of its method, None for student before and teacher."""

    label: str
    seeds: str
    figures: dict[str, Interval]
    method: int | None = None


def rows_of(groups: Sequence[Group]) -> list[Row]:
    """Student before, teacher, and the methods in their order."""
    before, teacher = ([_untrained(group, who) for group in groups] for who in ("student_before", "teacher"))
    teacher = [None if repr(one) == repr(other) else one for one, other in zip(teacher, before, strict=True)]
    labels = [group.label for group in groups]
    rows = [*_once("student before", before, labels), *_once("teacher", teacher, labels)]
    for number, group in enumerate(groups):
        ended = len(group.ended)
        seeds = str(len(group.runs)) if ended == len(group.runs) else f"{ended} of {len(group.runs)}"
        by_run = [figures_of(run, "student_after") for run in group.ended]
        figures = _means(by_run) | _means([training_figures(run) for run in group.ended or group.runs])
        rows.append(Row(group.label, seeds, figures, number))
    return rows


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """The columns with a figure in any row."""
    return [column for column in COLUMNS if any(column.name in row.figures for row in rows)]


def figures_of(run: Run, who: str) -> Figures:
    """The measures of a policy on held-out problems, those that there are."""
    figures = dict(run.figures.get(who, {}))
    figures.pop("reward", None)  # the mean over completions is that of the samples
    if "truncated" in figures:
        figures["ended"] = 1.0 - figures["truncated"]
    if who in run.samples and (reward := run.samples[who].reward) is not None:
        figures["reward"] = reward
    names = {column.name for column in COLUMNS} - {"reward_in_training"}
    return {name: value for name, value in figures.items() if name in names}


def training_figures(run: Run) -> Figures:
    """The mean reward of the last tenth of the steps, of one at least."""
    last = run.steps[-max(1, len(run.steps) // 10) :]
    rewards = [step.reward for step in last if step.reward is not None]
    return {"reward_in_training": statistics.fmean(rewards)} if rewards else {}


def text_of(interval: Interval, column: Column) -> str:
    """A mean, with ± and half of its interval where there is one."""
    factor = 100.0 if column.share else 1.0
    mean = number(factor * interval.mean, column.digits)
    return mean if math.isnan(interval.half) else f"{mean} ± {number(factor * interval.half, column.digits)}"


def number(value: float, digits: int) -> str:
    """A number with so many digits behind the point, or with an exponent where it would be long."""
    return f"{value:.{digits}f}" if abs(value) < _PLAIN else f"{value:.3g}"


def _means(by_run: Sequence[Figures]) -> dict[str, Interval]:
    """Means over runs of the figures that all of them have."""
    names = [name for name in by_run[0] if all(name in figures for figures in by_run)] if by_run else []
    return {name: interval_of([figures[name] for figures in by_run]) for name in names}


def _untrained(group: Group, who: str) -> dict[str, Interval] | None:
    """The figures of a policy that no seed changes; where the runs' differ all the same, their means."""
    by_run = [figures for run in group.runs if (figures := figures_of(run, who))]
    if not by_run:
        return None
    if all(figures == by_run[0] for figures in by_run):
        return {name: Interval(value, math.nan) for name, value in by_run[0].items()}
    return _means(by_run)


def _once(name: str, figures: Sequence[dict[str, Interval] | None], labels: Sequence[str]) -> list[Row]:
    """A row for all methods; one for each that has other figures, for another task or budget."""
    first: dict[str, tuple[str, dict[str, Interval]]] = {}
    for some, label in zip(figures, labels, strict=True):
        if some is not None:
            first.setdefault(repr(sorted(some.items())), (label, some))
    return [Row(name if len(first) == 1 else f"{name} ({label})", "", some) for label, some in first.values()]
