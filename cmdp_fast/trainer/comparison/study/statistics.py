"""What the lines of a study say: which setting of a method is chosen, and how far it is behind the best.

A setting is a method with one of its candidates. Its score is the share of completions that are right and within
budget. Two settings are compared seed by seed, over the seeds that both have.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..plan import REFERENCES
from .intervals import CONFIDENCE, LEAST, Interval, holm, interval_of, p_value
from .lines import Line
from .plan import Study

SCORE = "right_and_within"
REWARD = "reward_within"
ROUNDING = 0.002  # points: a share in a line has five digits, and two are compared


class Setting(NamedTuple):
    """A method of the study and one of its candidates."""

    method: str
    candidate: str


@dataclass(frozen=True)
class RegretRow:
    """A method's regret in points by situation, with the setting that it had there. A situation without a training
    that succeeded is absent."""

    method: str
    settings: dict[str, Setting]
    regrets: dict[str, Interval]
    mean: Interval | None
    """Over the situations, with the interval of its spread over seeds."""

    @property
    def worst(self) -> float:
        return max((regret.mean for regret in self.regrets.values()), default=math.nan)


@dataclass(frozen=True)
class Difference:
    """A method's score less that of the reference, in points; p is NaN for fewer than `LEAST` seeds."""

    situation: str
    method: str
    points: Interval
    p: float

    @property
    def apart(self) -> bool:
        return self.p < 1 - CONFIDENCE


class Results:
    """The lines of a study by situation and setting. Lines of nothing that is in the study are left out."""

    def __init__(self, study: Study, lines: Sequence[Line], score: str = SCORE) -> None:
        self.study, self.score = study, score
        self.situations = [situation.name for situation in study.situations]
        self.settings = [Setting(m.name, candidate) for m in study.methods for candidate in m.candidates]
        self._cells: dict[tuple[str, Setting], dict[int, Line]] = {}
        self.references: dict[tuple[str, str], Line] = {}
        """Teacher and student before of a situation, by its name and theirs."""
        self.lines: list[Line] = []
        self.failed: list[Line] = []
        for line in sorted(lines, key=lambda line: line.seed):
            cell = line.situation, Setting(line.method, line.candidate)
            if line.method in REFERENCES.values() and not line.failure:
                self.references[line.situation, line.method] = line
            if cell[0] not in self.situations or cell[1] not in self.settings or line.seed not in study.seeds:
                continue
            if line.failure:
                self.failed.append(line)
            else:
                self.lines.append(line)
                self._cells.setdefault(cell, {})[line.seed] = line
        self._with_failures = {(line.situation, Setting(line.method, line.candidate)) for line in self.failed}
        self.one_setting = {m.name: self.chosen(self.situations[0], m.name) for m in study.methods}
        """The setting of each method that was chosen on the first situation; None for one that has no figures there."""

    def of(self, situation: str, setting: Setting | None) -> dict[int, Line]:
        """The lines with figures, by seed."""
        return {} if setting is None else self._cells.get((situation, setting), {})

    def figure(self, situation: str, setting: Setting | None, name: str) -> Interval | None:
        """A figure over the seeds, None where it is not there."""
        lines = self.of(situation, setting).values()
        values = [line.figures[name] for line in lines if name in line.figures]
        return interval_of(values) if values else None

    def feasible(self, situation: str, setting: Setting) -> bool:
        """Whether enough completions are within budget, on average over the seeds, and no training failed."""
        within = self.figure(situation, setting, "within")
        return (
            within is not None
            and round(within.mean, 9) >= self.study.feasible
            and (situation, setting) not in self._with_failures
        )

    def best(self, situation: str) -> Setting | None:
        """The feasible setting with the highest score; of all settings, if none is feasible."""
        return self._best(situation, self.settings)

    def chosen(self, situation: str, method: str) -> Setting | None:
        """The same among a method's candidates."""
        return self._best(situation, [setting for setting in self.settings if setting.method == method])

    def _best(self, situation: str, settings: Sequence[Setting]) -> Setting | None:
        there = [setting for setting in settings if self.of(situation, setting)]
        pool = [setting for setting in there if self.feasible(situation, setting)] or there
        return max(pool, key=lambda setting: self._rank(situation, setting), default=None)

    def _rank(self, situation: str, setting: Setting) -> tuple[float, float]:
        """Score, and among equals the lower KL. Sums of the same numbers in another order are equal."""
        lines = self.of(situation, setting).values()
        score = statistics.fmean(line.figures[self.score] for line in lines)
        return round(score, 9), -statistics.fmean(line.figures["mean_kl"] for line in lines)

    def differences(self, situation: str, one: Setting | None, other: Setting | None) -> dict[int, float]:
        """The first setting's score less the second's in points, for each seed that both have."""
        first, second = self.of(situation, one), self.of(situation, other)
        return {
            seed: 100 * (first[seed].figures[self.score] - second[seed].figures[self.score])
            for seed in first
            if seed in second
        }

    def regret(self, situation: str, setting: Setting | None) -> Interval | None:
        """How many points a setting is behind the best one of the situation."""
        behind = self.differences(situation, self.best(situation), setting)
        return interval_of(list(behind.values())) if behind else None

    def regrets(self, one_setting: bool) -> list[RegretRow]:
        """A row per method, with the setting chosen on the first situation or with the best of each, by its worst
        regret and then by their mean. Methods without figures for a situation that others have come last."""
        rows = [self._regret_row(method.name, one_setting) for method in self.study.methods]
        rows = [row for row in rows if row.regrets]
        return sorted(
            rows, key=lambda row: (-len(row.regrets), round(row.worst, 6), sum(r.mean for r in row.regrets.values()))
        )

    def _regret_row(self, method: str, one_setting: bool) -> RegretRow:
        settings, regrets, behind = {}, {}, []
        for situation in self.situations:
            setting = self.one_setting[method] if one_setting else self.chosen(situation, method)
            differences = self.differences(situation, self.best(situation), setting)
            if setting is not None and differences:
                settings[situation] = setting
                regrets[situation] = interval_of(list(differences.values()))
                behind.append(differences)
        seeds = [seed for seed in self.study.seeds if behind and all(seed in differences for differences in behind)]
        means = [statistics.fmean(differences[seed] for differences in behind) for seed in seeds]
        return RegretRow(method, settings, regrets, interval_of(means) if means else None)

    @property
    def reference(self) -> str:
        """The method that the others are compared with: the study's first."""
        return self.study.methods[0].name

    def against_reference(self) -> list[Difference]:
        """Every other method against the reference in every situation, each with its one setting."""
        compared = []
        for situation in self.situations:
            for method in self.study.methods[1:]:
                settings = self.one_setting[method.name], self.one_setting[self.reference]
                points = list(self.differences(situation, *settings).values())
                if points:
                    p = p_value(points, ROUNDING) if len(points) >= LEAST else math.nan
                    compared.append(Difference(situation, method.name, interval_of(points), p))
        return compared


def stand_correction(differences: Sequence[Difference]) -> int:
    """How many of the differences Holm's method keeps, at 5 % for all of them together."""
    return holm([difference.p for difference in differences if not math.isnan(difference.p)])
