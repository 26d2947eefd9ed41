"""The tables of a comparison: mean and standard error over the seeds of each method."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cmdp_fast.files import as_json
from cmdp_fast.info import machine
from cmdp_fast.terminal import drawn

from ..settings.config import TrainConfig
from .plan import REFERENCES, Result, Variant, training_seconds


class Column(NamedTuple):
    """A figure of the table: its name in `summary.json`, its title, and whether it is a share."""

    name: str
    title: str
    share: bool = False


COLUMNS = (
    Column("accuracy", "accuracy", share=True),
    Column("constraint_satisfaction", "constraint satisfied", share=True),
    Column("prefix_satisfaction", "prefixes satisfied", share=True),
    Column("mean_cumulative_kl", "cumulative KL"),
    Column("cvar_cumulative_kl", "CVaR of it"),
    Column("correct_and_feasible", "right and feasible", share=True),
    Column("reasoning_success", "reasoning success", share=True),
    Column("mean_length", "length"),
    Column("seconds", "seconds"),
    Column("win", "win", share=True),
    Column("tie", "tie", share=True),
    Column("loss", "loss", share=True),
    Column("disagreement", "judge's orders disagree", share=True),
)


class Estimate(NamedTuple):
    """A mean over runs and its standard error, NaN for a single run."""

    mean: float
    error: float


@dataclass(frozen=True)
class TableRow:
    """A method, or the teacher or the student before the training (which have no variant)."""

    label: str
    runs: int
    config: TrainConfig
    figures: dict[str, Estimate]
    variant: Variant | None = None


def figures_of(result: Result) -> dict[str, float]:
    """A finished run's figures by column; `seconds` are those of its steps, without evaluations."""
    assert result.summary is not None
    return result.summary["student_after"] | {"seconds": training_seconds(result.summary)} | result.judged


def summarise(results: Sequence[Result]) -> list[TableRow]:
    """Teacher, student before, and a row for each method with a finished run, in their order."""
    finished = [result for result in results if result.summary is not None]
    if not finished:
        return []
    # Seeds share these evaluations; methods too, unless they change the budget: then the recipe's own is shown.
    plain = next((r for r in finished if not r.run.variant.overrides), finished[0])
    assert plain.summary is not None
    rows = []
    for who, label in REFERENCES.items():
        if plain.summary[who] is None:  # a teacher that cannot be sampled
            continue
        figures = {name: Estimate(value, math.nan) for name, value in _known(plain.summary[who]).items()}
        rows.append(TableRow(label, 1, plain.run.config, figures))
    by_label: dict[str, list[Result]] = {}
    for result in finished:
        by_label.setdefault(result.run.variant.label, []).append(result)
    for label, some in by_label.items():
        by_run = [_known(figures_of(result)) for result in some]
        names = [c.name for c in COLUMNS if all(c.name in figures for figures in by_run)]
        figures = {name: estimate([f[name] for f in by_run]) for name in names}
        rows.append(TableRow(label, len(some), some[0].run.config, figures, some[0].run.variant))
    return rows


def _known(figures: dict[str, Any]) -> dict[str, float]:
    """The figures that are there: JSON has null in the place of NaN."""
    return {name: value for name, value in figures.items() if value is not None}


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of the mean."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(statistics.fmean(values), error)


def columns_of(rows: Sequence[TableRow]) -> list[Column]:
    """The columns with a figure in any row."""
    return [column for column in COLUMNS if any(column.name in row.figures for row in rows)]


def cell(row: TableRow, column: Column) -> str:
    """Mean ± standard error as text."""
    if column.name not in row.figures:
        return ""
    value, error = row.figures[column.name]
    factor, digits = (100.0, 1) if column.share else (1.0, 2 if "kl" in column.name else 1)
    spread = "" if math.isnan(error) else f" ± {factor * error:.{digits}f}"
    return f"{factor * value:.{digits}f}{spread}"


def title(column: Column) -> str:
    """A column's heading with its unit."""
    unit = {"mean_cumulative_kl": "nats", "cvar_cumulative_kl": "nats", "mean_length": "tokens"}.get(column.name)
    unit = "%" if column.share else unit
    return f"{column.title} ({unit})" if unit else column.title


def text_of(rows: Sequence[TableRow]) -> str:
    """The table as the terminal shows it."""
    from rich.console import Console
    from rich.table import Table

    every, console = columns_of(rows), Console()
    columns = fitting(rows, every, console.width) if console.is_terminal else every
    rest = None if columns == every else f"{len(every) - len(columns)} more columns: table.md"
    table = Table(title=caption(rows), caption=rest)
    table.add_column("", no_wrap=True)
    for heading in ("runs", *map(title, columns)):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row.label, str(row.runs), *(cell(row, column) for column in columns))
    return drawn(table, None if console.is_terminal else 32 + 15 * (len(every) + 1))  # a pipe has no width to keep to


def fitting(rows: Sequence[TableRow], columns: Sequence[Column], width: int) -> list[Column]:
    """The first columns whose figures fit so many characters whole; one at least."""
    room = width - max(len(row.label) for row in rows) - len("runs") - 7  # a border on either side, and between
    fit = list[Column]()
    for column in columns:
        words = [*title(column).split(), *(cell(row, column) for row in rows)]
        room -= max(map(len, words)) + 3
        if fit and room < 0:
            break
        fit.append(column)
    return fit


def caption(rows: Sequence[TableRow]) -> str:
    """The caption of the table."""
    config = rows[0].config
    per = " a token" if config.budget_per_token else ""
    prefix = f", prefix budget {config.prefix_budget:g} nats a token" if config.prefix_budget else ""
    return f"{config.recipe}: mean ± standard error over runs; budget {config.budget:g} nats{per}{prefix}"


def markdown(rows: Sequence[TableRow], command: str) -> str:
    """The table in Markdown, after the command that made it, the machine and the versions."""
    columns = columns_of(rows)
    lines = [
        f"    {command}",
        "",
        f"{machine()}.",
        "",
        f"{caption(rows)}. A method with a budget of its own is measured by that. Cumulative KL is the exact reverse "
        "KL summed over a completion, its CVaR the mean of the worst tenth; seconds are those of the training's steps.",
        "",
        "| | runs | " + " | ".join(map(title, columns)) + " |",
        "| --- |" + " ---: |" * (len(columns) + 1),
    ]
    for row in rows:
        lines.append("| " + " | ".join([row.label, str(row.runs), *(cell(row, column) for column in columns)]) + " |")
    return "\n".join(lines) + "\n"


def csv_of_rows(rows: Sequence[TableRow]) -> str:
    """The same with full precision: a mean and a standard error per column."""
    columns = columns_of(rows)
    table: list[list[Any]] = [
        ["method", "runs", "budget", *(f"{c.name}{end}" for c in columns for end in ("", "_stderr"))]
    ]
    for row in rows:
        values: list[Any] = []
        for column in columns:
            figure = row.figures.get(column.name)
            values += ["", ""] if figure is None else [figure.mean, "" if math.isnan(figure.error) else figure.error]
        table.append([row.label, row.runs, row.config.budget, *values])
    return _csv(table)


def csv_of_results(results: Sequence[Result]) -> str:
    """A line per run, those that failed included."""
    by_run = [_known(figures_of(r)) if r.summary is not None else {} for r in results]
    names = list(dict.fromkeys(name for figures in by_run for name in figures))
    table: list[list[Any]] = [["method", "changes", "seed", "run", "failure", "budget", *names]]
    for result, figures in zip(results, by_run, strict=True):
        run = result.run
        about = [run.config.method, as_json(run.variant.overrides), run.config.seed, run.config.name, result.failure]
        table.append([*about, run.config.budget, *(figures.get(name, "") for name in names)])
    return _csv(table)


def _csv(table: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    return text.getvalue()
