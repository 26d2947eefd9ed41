"""The studies of language models together: what one setting is worth over all their situations.

    python benchmarks/together.py

reads the lines of `transfer`, `faulty-teacher` and `per-completion` (benchmarks/results/study) and writes the page
benchmarks/results/study/together with the picture of the README. Nothing is chosen here: a row is a setting that all
three studies have. In the first a student does well that follows its teacher closely, in the second one that departs
from it as far as the budget allows, and in the third the budget is for each completion and not for their mean; so a
setting that is good in all of them has to tell these situations apart by the budget and the reward alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from cmdp_fast.files import replacing, write_text
from cmdp_fast.trainer.comparison.study.intervals import Interval, interval_of
from cmdp_fast.trainer.comparison.study.lines import FILE, read_lines
from cmdp_fast.trainer.comparison.study.page import text_of
from cmdp_fast.trainer.comparison.study.plan import read_study
from cmdp_fast.trainer.comparison.study.plots import cells, hatch
from cmdp_fast.trainer.comparison.study.statistics import Results

FOLDER = Path(__file__).parent / "results" / "study"
STUDIES = ("transfer", "faulty-teacher", "per-completion")
PICTURE = "together.png"
CLIP = 40.0  # points: where the colours end
NAMES = {
    "cmdp:budget_price=0": "cmdp, no price",
    "cmdp:discrepancy_weight=0.1": "cmdp, weight 0.1",
    "hinge:discrepancy_weight=0": "price alone",
    "pid:pid_gains=[0.01, 0.001, 0.001]": "pid, a tenth of the gains",
}
TITLES = {"a third of the problems tempts": "a third tempts, 2 nats", "the same with 3 nats": "a third tempts, 3 nats"}
# Of the rows with a weight the picture has those that are not between two others of much the same colours. `worst_case`
# bounds something else, and is in the table alone.
SHOWN = (
    *("cmdp", "cmdp:budget_price=0", "cmdp:discrepancy_weight=0.1", "hinge", "hinge:discrepancy_weight=0"),
    *("pid", "pid:pid_gains=[0.01, 0.001, 0.001]", "barrier"),
    *("lagrangian:coefficient=0.001", "lagrangian:coefficient=0.01", "lagrangian:coefficient=0.1"),
    *("lagrangian:coefficient=1", "kl_reward:coefficient=0.1", "kl_loss:coefficient=1,kl_loss_correction=true"),
    *("grpo", "gkd", "minillm", "sft", "kd"),
)


@dataclass
class Row:
    """A setting in every situation of every study."""

    candidate: str
    regrets: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)
    """By study and situation, points behind the best of that situation by seed."""
    within: dict[tuple[str, str], float] = field(default_factory=dict)
    """The share of the completions within budget, of all seeds."""
    infeasible: set[tuple[str, str]] = field(default_factory=set)

    @property
    def name(self) -> str:
        method, _, changes = self.candidate.partition(":")
        if self.candidate in NAMES or not changes:
            return NAMES.get(self.candidate, method)
        value, _, more = changes.partition(",")
        return f"{method} {value.partition('=')[2]}" + (", with the ratio" if more else "")

    def mean(self, study: str = "") -> Interval:
        """Over the situations of a study, or of all, with the interval of its spread over seeds."""
        there = [regrets for (whose, _), regrets in self.regrets.items() if study in ("", whose)]
        seeds = [seed for seed in there[0] if all(seed in regrets for regrets in there)]
        return interval_of([statistics.fmean(regrets[seed] for regrets in there) for seed in seeds])

    @property
    def worst(self) -> tuple[float, str]:
        """The largest mean over seeds, and the situation."""
        return self.worst_of(self.regrets)

    def worst_of(self, places: Iterable[tuple[str, str]]) -> tuple[float, str]:
        """The same of these situations alone."""
        return max((statistics.fmean(self.regrets[place].values()), place[1]) for place in places)

    @property
    def least_within(self) -> tuple[float, str]:
        """The smallest share within budget, and the situation."""
        return min((share, where) for (_, where), share in self.within.items())

    def gain_over(self, other: Row) -> Interval:
        """Points more than another setting has, the mean over all situations, with the interval of its spread."""
        every = [regrets.keys() for row in (self, other) for regrets in row.regrets.values()]
        seeds = set.intersection(*map(set, every))
        return interval_of([other._of_seed(seed) - self._of_seed(seed) for seed in sorted(seeds)])

    def _of_seed(self, seed: int) -> float:
        return statistics.fmean(regrets[seed] for regrets in self.regrets.values())


def rows_of(studies: Sequence[Results]) -> list[Row]:
    """The settings that all studies have figures of in every situation, by their worst situation."""
    rows = []
    for candidate in dict.fromkeys(setting.candidate for setting in studies[0].settings):
        row = Row(candidate)
        for results in studies:
            setting = next((s for s in results.settings if s.candidate == candidate), None)
            for situation in results.situations:
                behind = results.differences(situation, results.best(situation), setting)
                if setting is not None and behind:
                    row.regrets[results.study.name, situation] = behind
                    lines = results.of(situation, setting).values()
                    row.within[results.study.name, situation] = statistics.fmean(x.figures["within"] for x in lines)
                    if not results.feasible(situation, setting):
                        row.infeasible.add((results.study.name, situation))
        if len(row.regrets) == sum(len(results.situations) for results in studies):
            rows.append(row)
    return sorted(rows, key=lambda row: (round(row.worst[0], 6), row.mean().mean))


def unscaled(studies: Sequence[Results]) -> list[tuple[str, str]]:
    """The situations with the reward as it is."""
    return [(r.study.name, x.name) for r in studies for x in r.study.situations if "reward_weights" not in x.settings]


def page_of(studies: Sequence[Results], rows: Sequence[Row]) -> str:
    count = sum(len(results.situations) for results in studies)
    had = {r.study.name: len({line.seed for line in r.lines}) for r in studies}
    reference = next(row for row in rows if row.candidate == studies[0].settings[0].candidate)
    of_studies = [f"{r.study.name} ({len(r.situations)})" for r in studies]
    heading = ["setting", *of_studies, "all", f"more than {reference.name}", "worst", "worst, reward x 1"]
    lines = [[*heading, "within", "least within"], ["---", *["---:"] * (len(studies) + 2), *["---"] * 2, "---:", "---"]]
    for row in rows:
        worsts = [f"{worst:.1f} ({where})" for worst, where in (row.worst, row.worst_of(unscaled(studies)))]
        cells = [text_of(row.mean(results.study.name)) for results in studies]
        more = "" if row is reference else text_of(row.gain_over(reference))
        share, where = row.least_within
        kept = [f"{count - len(row.infeasible)} of {count}", f"{100 * share:.1f} % ({where})"]
        lines.append([row.name, *cells, text_of(row.mean()), more, *worsts, *kept])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    whence = ", ".join(f"[{name}](../{name}/README.md) ({seeds} seeds)" for name, seeds in had.items())
    return f"""# What one setting is worth over all situations

    python benchmarks/together.py

From the lines of {whence}.

A row is a setting that all of these studies have; none was chosen here. (The default price of `cmdp`, `hinge` and the
price alone was chosen in two of the studies, with other seeds.) The regret of a situation is the share of completions
that are right and within budget, in points, of the best feasible setting of that situation less a setting's own, paired
by seed; the best was found in the same figures, which makes every regret slightly too large. Columns are means over
situations ± the half-width of the 95 % t interval over seeds, "all" over the seeds that every study has, and "more than
{reference.name}" the difference of such means, paired by seed and not corrected for the number of rows.

Five of the situations of `transfer` differ in the reward's scale alone. What is trained in units of the reward's range,
or without a reward, is the same in them; `lagrangian` and `kl_reward` weigh the reward as it is, as in TRL and verl.
"Worst, reward x 1" leaves out the four with another scale: there a weight has to suit lengths, models, problems and
budgets alone.

The score does not see by how much a budget is broken, nor a wrong answer over it. "Within": in how many situations 95 %
of the completions, of all seeds, keep the budget; "least within": how many do so in the situation where the fewest do.

![regret of one setting in every situation]({PICTURE})

{table}
"""


def drawn(studies: Sequence[Results], rows: Sequence[Row]) -> Figure:
    """A cell for each setting and situation with the points behind the best; hatched where it is over budget."""
    places = [(results.study.name, situation) for results in studies for situation in results.situations]
    same = unscaled(studies)
    rows = [row for row in rows if row.candidate in SHOWN]
    figure = Figure(figsize=(12.5, 1.9 + 0.27 * len(rows)), layout="constrained")
    axes = figure.subplots()
    values = [
        [*(statistics.fmean(row.regrets[place].values()) for place in places), row.worst[0], row.worst_of(same)[0]]
        for row in rows
    ]
    titles = [*(TITLES.get(situation, situation) for _, situation in places), "worst", "worst, reward x 1"]
    cells(axes, values, titles, [row.name for row in rows], "YlOrBr", CLIP)
    axes.set_xticks(range(len(titles)), titles, fontsize=9, rotation=45, ha="left")
    for y, row in enumerate(rows):
        for x, place in enumerate(places):
            if place in row.infeasible:
                hatch(axes, x, y)
    end = 0
    for results in studies:
        end += len(results.situations)
        axes.axvline(end - 0.5, color="white", lw=5)
        middle = end - (len(results.situations) + 1) / 2
        axes.text(middle, len(rows) - 0.4, results.study.name, ha="center", va="top", fontsize=10)
    figure.suptitle(
        "One setting in every situation: points behind the best that was found there, of the completions right and "
        "within budget (hatched: fewer than 95 % within)",
        fontsize=10.5,
    )
    return figure


def main(folder: Path = FOLDER) -> None:
    studies = [Results(read_study(name), read_lines(folder / name / FILE)) for name in STUDIES]
    rows = rows_of(studies)
    (folder / "together").mkdir(exist_ok=True)
    with replacing(folder / "together" / PICTURE) as part:
        drawn(studies, rows).savefig(part, format="png", dpi=110)
    write_text(folder / "together" / "README.md", page_of(studies, rows))


if __name__ == "__main__":
    main()
