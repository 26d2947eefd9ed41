"""The page of `known_transfer.py`: choices, tables, the picture. Functions of the lines of its runs."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sampled import Schedule

from cmdp_fast.files import replacing, write_json, write_text
from cmdp_fast.trainer.comparison.study.intervals import Interval, interval_of
from cmdp_fast.trainer.comparison.study.page import text_of

Line = dict[str, Any]
DEFAULTS = ("cmdp", "penalty=1 weight=1")
FIGURES = ("score", "reward", "within", "mean_kl", "largest_kl")


@dataclass(frozen=True)
class Study:
    """All runs, the best reward under the budget of every path in each situation, the teacher's, and the budget in
    nats."""

    lines: list[Line]
    optima: dict[str, float]
    teachers: dict[str, float]
    budgets: dict[str, float]
    feasible: float

    @cached_property
    def groups(self) -> dict[tuple[str, str, str], list[Line]]:
        """The seeds of each situation, method and setting, in order."""
        out = defaultdict(list)
        for line in self.lines:
            for place, seed in enumerate(line["seeds"]):
                one = {name: line[name][place] for name in FIGURES}
                out[line["situation"], line["method"], line["candidate"]].append(one | {"seed": seed})
        return {key: sorted(group, key=lambda one: one["seed"]) for key, group in out.items()}

    @property
    def situations(self) -> list[str]:
        return list(self.optima)

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(method for _, method, _ in self.groups))

    def mean(self, name: str, situation: str, method: str, candidate: str) -> float:
        return statistics.fmean(line[name] for line in self.groups[situation, method, candidate])

    def is_feasible(self, situation: str, method: str, candidate: str) -> bool:
        return self.mean("within", situation, method, candidate) >= self.feasible

    def choice(self, situation: str, method: str) -> str:
        """The setting with the highest score among the feasible ones, or among all where none is; of equal ones that
        of the smallest KL."""
        tried = [candidate for where, which, candidate in self.groups if (where, which) == (situation, method)]
        keeping = [each for each in tried if self.is_feasible(situation, method, each)]

        def worth(candidate: str) -> tuple[float, float]:
            key = situation, method, candidate
            return self.mean("score", *key), -self.mean("mean_kl", *key)

        return max(keeping or tried, key=worth)

    def one_setting(self, method: str) -> str:
        """The setting that is chosen on the first situation."""
        return self.choice(self.situations[0], method)

    def regret(self, situation: str, method: str, candidate: str) -> Interval:
        """How much more the optimum is worth, in percent of it."""
        best = self.optima[situation]
        return interval_of(
            [100.0 * (best - line["score"]) / best for line in self.groups[situation, method, candidate]]
        )

    def summary(self) -> list[dict[str, Any]]:
        """A row per situation and method: the one setting and the best one there."""
        return [
            {"situation": situation, "method": method, "optimum": round(self.optima[situation], 7)}
            | {
                kind: self._figures(situation, method, candidate)
                for kind, candidate in (
                    ("one setting", self.one_setting(method)),
                    ("best setting here", self.choice(situation, method)),
                )
            }
            for situation in self.situations
            for method in self.methods
        ]

    def _figures(self, situation: str, method: str, candidate: str) -> dict[str, Any]:
        key = situation, method, candidate
        regret = self.regret(*key)
        means = {name: float(f"{self.mean(name, *key):.5g}") for name in FIGURES}
        least = min(line["within"] for line in self.groups[key])
        spread = {"regret": round(regret.mean, 3), "half": round(regret.half, 3), "least within": least}
        return {"candidate": candidate} | means | spread


def show(study: Study) -> None:
    """The table of one setting on the terminal: regret in percent, and what is within budget where not all is."""
    console = Console() if Console().is_terminal else Console(width=200)
    out = Table(title="regret in % of the optimum with the setting of the first situation", title_justify="left")
    out.add_column("method")
    for situation in study.situations:
        out.add_column(situation, justify="right")
    for method in study.methods:
        candidate = study.one_setting(method)
        cells = []
        for situation in study.situations:
            within = study.mean("within", situation, method, candidate)
            note = "" if within > 0.9995 else f" ({within:.0%})"
            cells.append(f"{study.regret(situation, method, candidate).mean:.1f}{note}")
        out.add_row(method, *cells)
    console.print(out)


def draw(path: Path, study: Study) -> None:
    """Regret of each method in each situation, with one setting and with the best one there."""
    figure = Figure(figsize=(15, 9), layout="constrained")
    settings: dict[str, Callable[[str, str], str]] = {
        "one setting, chosen on the first": lambda situation, method: study.one_setting(method),
        "the best setting of each": study.choice,
    }
    for axes, (title, setting) in zip(figure.subplots(2, 1), settings.items(), strict=True):
        rows = [[0.0] * len(study.situations) for _ in study.methods]
        for y, method in enumerate(study.methods):
            for x, situation in enumerate(study.situations):
                key = situation, method, setting(situation, method)
                rows[y][x] = regret = study.regret(*key).mean
                within = study.mean("within", *key)
                over = not study.is_feasible(*key)
                axes.text(
                    *(x, y, f"{regret + 0.0:.0f}{f'{chr(10)}{within:.0%} within' if over else ''}"),
                    **{"ha": "center", "va": "center", "fontsize": 8, "weight": "normal" if over else "bold"},
                    color="white" if regret > 60 else "black",
                )
        axes.imshow(rows, cmap="YlOrRd", vmin=0, vmax=100, aspect="auto")
        names = [situation.replace(", ", "\n") for situation in study.situations]
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.set_yticks(range(len(study.methods)), study.methods)
        axes.set_title(f"regret in % of the optimum: {title} (bold: {study.feasible:.0%} within budget)", fontsize=10)
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=110)


def verdicts(study: Study) -> list[str]:
    """Where a method's one setting is not feasible, or loses a tenth of what there is; and cmdp's defaults."""
    out = [f"Of {len(study.situations)} situations:", ""]
    for method in study.methods:
        candidate = study.one_setting(method)
        out.append(_verdict(study, method, candidate, f" ({candidate})" if candidate else ""))
    if (study.situations[0], *DEFAULTS) in study.groups:
        out.append(_verdict(study, *DEFAULTS, f" with the library's defaults ({DEFAULTS[1]})"))
    return out


def _verdict(study: Study, method: str, candidate: str, setting: str) -> str:
    regret = {each: study.regret(each, method, candidate).mean for each in study.situations}
    over = [each for each in study.situations if not study.is_feasible(each, method, candidate)]
    lost = [each for each in study.situations if each not in over and regret[each] > 10.0]
    return (
        f"- `{method}`{setting}: {_those(over, 'over budget')}, {_those(lost, 'within it, a tenth or more below')}; "
        f"largest regret {max(regret.values()):.1f}%."
    )


def _those(situations: list[str], what: str) -> str:
    named = f" ({'; '.join(situations)})" if situations else ""
    return f"{len(situations)} {what}{named}"


def table(study: Study, cell: Callable[[str, str], str]) -> list[str]:
    """Markdown: a row per situation, a column per method."""
    lines = [
        "| situation | teacher | optimum | " + " | ".join(study.methods) + " |",
        "| --- | --: | --: |" + " --: |" * len(study.methods),
    ]
    for situation in study.situations:
        ends = (f"{of[situation]:.4f}" for of in (study.teachers, study.optima))
        cells = [*ends, *(cell(situation, method) for method in study.methods)]
        lines.append(f"| {situation} | {' | '.join(cells)} |")
    return lines


def regret_cell(study: Study, situation: str, method: str, candidate: str) -> str:
    """Regret with its interval, and the share within budget where it is not all."""
    within = study.mean("within", situation, method, candidate)
    text = text_of(study.regret(situation, method, candidate))
    return text if within > 0.9995 else f"{text} ({within:.0%} within)"


def dearest_cell(study: Study, situation: str, method: str, candidate: str) -> str:
    """The largest KL of a path of any seed, in percent of the budget."""
    largest = max(line["largest_kl"] for line in study.groups[situation, method, candidate])
    return f"{100.0 * largest / study.budgets[situation]:.0f}"


def write(folder: Path, study: Study, machine: str, schedule: Schedule) -> None:
    """README.md, summary.json and regret.png in a folder."""
    write_json(folder / "summary.json", {"machine": machine, "schedule": asdict(schedule), "rows": study.summary()})
    draw(folder / "regret.png", study)
    seeds, trainings = max(map(len, study.groups.values())), sum(map(len, study.groups.values()))
    page = [
        "# One setting for all situations, where the optimum is known",
        "",
        "`python benchmarks/known_transfer.py --out benchmarks/results/study/known`: "
        f"{trainings:,} trainings, {seeds} seeds, {schedule.steps} steps of {schedule.completions} completions, Adam "
        f"at {schedule.rate:g} falling to 0. {machine}.",
        "",
        "The head of the script says what the situations, the settings and the figures are; it was written before the "
        "runs. Regret: how much more than a method's policy the best one with every path within budget is worth, in "
        "percent, where a path over budget pays 0; the teacher earns a part of the optimum itself. ± is the 95% t "
        "interval over seeds. In brackets: the share of the "
        "completions within budget where it is not all. Figures are exact, over all paths.",
        "",
        "![regret by method and situation](regret.png)",
        "",
        "## With the setting of the first situation",
        "",
        *verdicts(study),
        "",
        *table(study, lambda situation, method: regret_cell(study, situation, method, study.one_setting(method))),
        "",
        "The dearest path of any seed, in percent of the budget:",
        "",
        *table(study, lambda situation, method: dearest_cell(study, situation, method, study.one_setting(method))),
        "",
        "## With the best setting of each situation",
        "",
        *table(study, lambda situation, method: regret_cell(study, situation, method, study.choice(situation, method))),
        "",
        "A regret below 0 is possible: a path within 5% above the budget counts as within, and a policy that lets a "
        "few rare paths go over budget may be worth more than one that lets none.",
        "",
        "The grid of coefficients is coarse, and finer on the first situation: 0.5 and 0.55 suit its scale alone. So "
        "a part of the regret of `lagrangian` and `k1_reward` with the best setting of another scale, and of `k3_loss` "
        "everywhere, is the grid's. `k3_loss` does not depend on the reward's scale, since its advantages are divided "
        "by their deviation; the others here are not, but for `grpo`.",
    ]
    write_text(folder / "README.md", "\n".join(page) + "\n")
