"""The page of a study, written from its lines: what was decided before the runs, tables, and what is not told apart."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from cmdp_fast.digest import opened
from cmdp_fast.errors import readable
from cmdp_fast.files import write_text
from cmdp_fast.info import machine

from ...records.session import command_line
from ..table import Column
from .intervals import CONFIDENCE, LEAST, Interval, interval_of
from .lines import FILE, Line, Parts
from .names import label, short
from .plan import TEACHER, Study
from .plots import budgets_alone, draw_all
from .statistics import REWARD, SCORE, Difference, RegretRow, Results, Setting, stand_correction

COLUMNS = (
    Column("within", "within budget (%)", share=True),
    Column("accuracy", "accuracy (%)", share=True),
    Column(SCORE, "right and within (%)", share=True),
    Column(REWARD, "reward within (%)", share=True),
    Column("reasoning_success", "reasoning success (%)", share=True),
    Column("mean_kl", "mean KL (nats)"),
    Column("cvar_kl", "CVaR of KL (nats)"),
    Column("mean_length", "length (tokens)"),
)
MARK = "†"
LEAST_PART = 0.04  # of the completions: of some hundreds
BY_REWARD = (
    "The task may reward more than the right answer, such as brevity, and that is what a method spends its budget for. "
    "Here the score is the reward of the completions within budget, in percent of what a right answer is worth, and "
    "each method's setting is the best by that."
)


def write_page(folder: Path, study: Study, lines: Sequence[Line], command: Sequence[str]) -> None:
    """Writes README.md, results.csv and the plots into a folder, from lines that may be incomplete."""
    results = Results(study, lines)
    plots = draw_all(folder, results)
    write_text(folder / "results.csv", csv_of(results))
    write_text(folder / "README.md", page_of(results, command, _origin(folder), plots))


def page_of(results: Results, command: Sequence[str], origin: str, plots: Sequence[str] = ()) -> str:
    """The page in Markdown. ``origin``: machine and versions; ``plots``: the files that there are."""
    study = results.study
    parts = [
        f"# Study: {study.name}",
        f"    {command_line(command)}",
        _about(results, origin),
        "The head of the study's file says what was decided before the runs, and what was changed later:",
        _quoted(study.text),
    ]
    pictures = {name: f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in plots}
    several = len(results.situations) > 1
    title = "One setting for all situations" if several else "Regret"
    parts += [f"## {title}", *_take(pictures, "regret.png"), _regrets(results, one_setting=True)]
    if several and any(len(method.candidates) > 1 for method in study.methods):
        parts += ["## The best setting of each situation", _regrets(results, one_setting=False)]
    if all(REWARD in line.figures for line in results.lines):
        by_reward = Results(study, [*results.lines, *results.failed, *results.references.values()], REWARD)
        parts += ["## By the task's reward", BY_REWARD, _regrets(by_reward, one_setting=True)]
    parts += [f"## Against {results.reference}", *_against(results.against_reference(), results)]
    parts += ["## Within budget on average only", _average_only(results)]
    parts += ["## Figures", *_take(pictures, "frontier.png"), *_take(pictures, "kl_distribution.png")]
    if budgets_alone(results):
        parts += _above_teacher(results)
    for situation in results.situations:
        parts += [f"### {situation}", _figures(results, situation)]
    if study.kinds:
        parts += ["## Over budget, by kind of prompt and by length", *_take(pictures, "by_kind.png")]
        parts += _violations(results)
    parts += ["## Failures", _failures(results.failed)]
    return "\n\n".join(part for part in parts if part) + "\n"


# ---------------------------------------------------------------------------------------------------- what was run


def _about(results: Results, origin: str) -> str:
    study = results.study
    trainings = {line.training: line for line in results.lines}
    seconds = math.fsum(line.figures.get("seconds", 0.0) for line in trainings.values())
    examples = sorted({int(line.figures["examples"]) for line in trainings.values() if "examples" in line.figures})
    wanted = len(results.situations) * len(results.settings) * len(study.seeds)
    had = len(results.lines)
    missing = "" if had == wanted else f" **{wanted - had} of {wanted} lines are missing or failed.**"
    spread = (
        f"Figures are means over seeds ± the half-width of the {_percent(CONFIDENCE)} t interval "
        f"({len(study.seeds) - 1} degrees of freedom where no seed is missing)."
        if len(study.seeds) > 1
        else "There is one seed, so there are no intervals."
    )
    return (
        f"{origin}.\n\nRecipe `{study.recipe}`, seeds {', '.join(map(str, study.seeds))}; {len(trainings)} trainings "
        f"(one that several situations share is counted once), {seconds / 3600:.1f} hours of rollouts, scoring and "
        f"updates; {' or '.join(map(str, examples)) or 'no'} held-out completions of each.{missing} {spread}\n\n"
        "The KL of a completion is the exact reverse KL from the teacher, summed over its tokens, for every method "
        "alike; its CVaR is the mean of the worst tenth. All trainings are evaluated on the same problems with the "
        "same random numbers, so an interval is the spread of trainings alone. A setting's score is the share of "
        "completions that are right and within budget. It is feasible where "
        f"{_percent(study.feasible)} of its completions are within budget and "
        f"no training of it failed; {MARK} marks those that are not. The regret is the score of the best feasible "
        "setting less a setting's own, paired by seed, in points: below 0 for a setting that is not feasible and yet "
        "more often right and within budget. The best was found in the same figures that it is measured by, which "
        "makes every regret slightly too large."
    )


def _origin(folder: Path) -> str:
    """The machine and the versions that the first line of the results names, else those of here."""
    try:
        with opened(folder / FILE) as lines:
            head = json.loads(next(lines).decode())
        return readable(head["machine"]) if "study" in head else machine()
    except (OSError, StopIteration, ValueError, KeyError, TypeError, RecursionError):  # no file, or one without a head
        return machine()


def _quoted(text: str) -> str:
    """The comment that a TOML file begins with."""
    head = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        head.append(f"> {line[1:].removeprefix(' ')}".rstrip())
    return "\n".join(head)


# ---------------------------------------------------------------------------------------------------- tables


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]], right: int = 1) -> str:
    """A table whose columns stand to the right from the given one on."""
    align = ["---" if i < right else "---:" for i in range(len(heading))]
    escaped = [[text.replace("|", "\\|") for text in row] for row in (heading, *rows)]
    escaped.insert(1, align)
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def text_of(interval: Interval | None, factor: float = 1.0, digits: int = 1) -> str:
    """Mean ± half-width, nothing for a figure that is not there."""
    if interval is None:
        return ""
    spread = "" if math.isnan(interval.half) else f" ± {factor * interval.half:.{digits}f}"
    return f"{_number(factor * interval.mean, digits)}{spread}"


def _number(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # without the sign of a zero


def _percent(share: float) -> str:
    return f"{round(100 * share, 3):g} %"


def _figure(results: Results, situation: str, setting: Setting, column: Column) -> str:
    return _cell(results.figure(situation, setting, column.name), column)


def _cell(figure: Interval | None, column: Column) -> str:
    return text_of(figure, *((100.0, 1) if column.share else (1.0, 2 if "kl" in column.name else 1)))


def _regrets(results: Results, one_setting: bool) -> str:
    """Methods by situations, by their worst regret."""
    rows = results.regrets(one_setting)
    heading = ["", *(["setting"] if one_setting else []), *results.situations, "worst", "mean", "feasible"]
    table = _table(heading, (_regret_row(results, row, one_setting) for row in rows), right=1 + one_setting)
    if one_setting:
        first = results.situations[0]
        notes = [
            f"Regret in points. The setting is the one with the highest score on {first}, of those feasible there."
        ]
    else:
        notes = ["Regret in points, with the candidate that was the best feasible one in brackets."]
    notes.append("The last column: in how many situations the setting is feasible.")
    unmet = [situation for situation in results.situations if _none_feasible(results, situation)]
    if unmet:
        notes.append(f"No setting is feasible in {', '.join(unmet)}: the best is then the one with the highest score.")
    return f"{table}\n\n{' '.join(notes)}"


def _none_feasible(results: Results, situation: str) -> bool:
    best = results.best(situation)
    return best is not None and not results.feasible(situation, best)


def _regret_row(results: Results, row: RegretRow, one_setting: bool) -> list[str]:
    several = len({s.candidate for s in results.settings if s.method == row.method}) > 1
    cells = [row.method]
    if one_setting:
        cells.append(short(next(iter(row.settings.values()))) if several else "")
    kept = 0
    for situation in results.situations:
        if situation not in row.regrets:
            cells.append("none")
            continue
        setting = row.settings[situation]
        feasible = results.feasible(situation, setting)
        kept += feasible
        mark = "" if feasible else MARK
        which = f" ({short(setting)})" if several and not one_setting else ""
        cells.append(f"{text_of(row.regrets[situation])}{mark}{which}")
    return [*cells, _number(row.worst, 1), text_of(row.mean), f"{kept} of {len(row.regrets)}"]


def _figures(results: Results, situation: str) -> str:
    """The figures of each method: of its one setting, and of its best one where that is another."""
    settings = []
    for method in results.study.methods:
        for setting in (results.one_setting[method.name], results.chosen(situation, method.name)):
            if setting is not None and setting not in settings and results.of(situation, setting):
                settings.append(setting)
    columns = [c for c in COLUMNS if any(results.figure(situation, s, c.name) is not None for s in settings)]
    budgets = sorted({line.budget for setting in settings for line in results.of(situation, setting).values()})
    rows = [_reference(line, columns) for (where, _), line in results.references.items() if where == situation]
    for setting in settings:
        name = label(results.study, setting)
        if setting != results.one_setting[setting.method]:
            name += ", the best here"
        mark = "" if results.feasible(situation, setting) else MARK
        seeds = str(len(results.of(situation, setting)))
        rows.append([name + mark, seeds, *(_figure(results, situation, setting, column) for column in columns)])
    table = _table(["", "seeds", *(column.title for column in columns)], rows)
    return f"Budget {', '.join(f'{budget:g}' for budget in budgets) or 'unknown'} nats.\n\n{table}"


def _above_teacher(results: Results) -> list[str]:
    """By how much each method's accuracy is above its teacher's, at each budget, and for each nat that it spends."""
    rows = []
    for method in results.study.methods:
        cells = []
        for situation in results.situations:
            teacher = results.references.get((situation, TEACHER))
            setting = results.chosen(situation, method.name)
            lines = results.of(situation, setting).values()
            if teacher is None or setting is None or not lines:
                cells.append("")
                continue
            gains = [100 * (line.figures["accuracy"] - teacher.figures["accuracy"]) for line in lines]
            spent = math.fsum(line.figures["mean_kl"] for line in lines) / len(lines)
            per_nat = f"{interval_of(gains).mean / spent:.0f}" if spent else "no KL"
            mark = "" if results.feasible(situation, setting) else MARK
            cells.append(f"{text_of(interval_of(gains))}{mark} ({per_nat})")
        rows.append([method.name, *cells])
    return [
        "### Above the teacher",
        "Accuracy less that of the teacher in points, with the best setting of each budget; in brackets that for each "
        "nat of the mean KL.",
        _table(["", *results.situations], rows),
    ]


def _reference(line: Line, columns: Sequence[Column]) -> list[str]:
    """The row of the teacher, or of the student before: an evaluation alone."""
    figures = [interval_of([line.figures[c.name]]) if c.name in line.figures else None for c in columns]
    return [line.method, "", *(_cell(figure, column) for figure, column in zip(figures, columns, strict=True))]


def _against(differences: Sequence[Difference], results: Results) -> list[str]:
    """What beats the reference, what it beats, and what is not told apart: by method, with its situations."""
    known = [difference for difference in differences if not math.isnan(difference.p)]
    if not known:
        return [f"Nothing can be told apart: it takes {LEAST} seeds that both methods have."]
    apart = [difference for difference in known if difference.apart]
    even = [difference for difference in known if not difference.apart]
    count = len(known)
    return [
        f"Score of each method less that of {results.reference}, both with their one setting, paired by seed: {count} "
        f"differences, of which {len(apart)} have an interval without 0. If there were no difference at all, about "
        f"{(1 - CONFIDENCE) * count:.0f} of them would have one by chance; {stand_correction(known)} stand Holm's "
        f"correction for {count} comparisons.",
        f"**Better than {results.reference}:**",
        _listed([difference for difference in apart if difference.points.mean > 0], results),
        f"**Worse than {results.reference}:**",
        _listed([difference for difference in apart if difference.points.mean < 0], results),
        "**Not told apart:**",
        _listed(even, results),
    ]


def _listed(differences: Sequence[Difference], results: Results) -> str:
    by_method: dict[str, list[str]] = {}
    for difference in differences:
        setting = results.one_setting[difference.method]
        assert setting is not None  # it has a difference
        mark = "" if results.feasible(difference.situation, setting) else MARK
        text = f"{difference.situation} ({text_of(difference.points)}){mark}"
        by_method.setdefault(difference.method, []).append(text)
    return _items(by_method)


def _items(texts: dict[str, list[str]]) -> str:
    return "\n".join(f"- {name}: {', '.join(each)}" for name, each in texts.items()) or "None."


def _average_only(results: Results) -> str:
    """Methods whose mean KL keeps the budget while too many completions do not, each with its one setting."""
    by_method: dict[str, list[str]] = {}
    for setting in results.one_setting.values():
        for situation in results.situations:
            mean, within = (results.figure(situation, setting, name) for name in ("mean_kl", "within"))
            if setting is None or mean is None or within is None:
                continue
            budget = next(iter(results.of(situation, setting).values())).budget
            if mean.mean <= budget and within.mean < results.study.feasible:
                over = text_of(Interval(1 - within.mean, within.half), 100.0)
                text = f"{situation} (mean {text_of(mean, digits=2)} of {budget:g} nats, {over} % over)"
                by_method.setdefault(label(results.study, setting), []).append(text)
    return (
        f"Mean KL within the budget, and more than {_percent(1 - results.study.feasible)} of the completions over it, "
        f"of each method with its one setting:\n\n{_items(by_method)}\n\n"
        "Training by training, with every candidate: of those whose own mean KL is within the budget, how many have "
        f"more than {_percent(1 - results.study.feasible)} of their completions over it, and up to how many:\n\n"
        f"{_items(_average_only_by_training(results))}"
    )


def _average_only_by_training(results: Results) -> dict[str, list[str]]:
    by_method: dict[str, list[str]] = {}
    for method in results.study.methods:
        for situation in results.situations:
            settings = [Setting(method.name, candidate) for candidate in method.candidates]
            lines = [line for setting in settings for line in results.of(situation, setting).values()]
            shares = [1 - line.figures["within"] for line in lines if line.figures["mean_kl"] <= line.budget]
            over = [share for share in shares if round(share, 9) > round(1 - results.study.feasible, 9)]
            if over:
                text = f"{situation} ({len(over)} of {len(shares)}, up to {100 * max(over):.1f} %)"
                by_method.setdefault(method.name, []).append(text)
    return by_method


def _violations(results: Results) -> list[str]:
    """The share over budget of each kind of prompt and of each length of completions, each method with its one
    setting."""
    parts = ["Completions over budget (%), and in brackets the share of all completions that are of that part (%)."]
    for situation in results.situations:
        lines = {m: list(results.of(situation, setting).values()) for m, setting in results.one_setting.items()}
        kinds = {method: [line.kinds for line in each] for method, each in lines.items() if each}
        lengths = {method: [line.lengths for line in each] for method, each in lines.items() if each}
        present = {name for each in lengths.values() for each_seed in each for name in each_seed}
        by_length = sorted(present, key=lambda name: int(name.partition("-")[0]))
        if any(part for each in kinds.values() for part in each):
            names = [kind.name for kind in results.study.kinds]
            parts += [f"{situation}, by kind of prompt:", _over_budget(kinds, names)]
        parts += [f"{situation}, by length in tokens:", _over_budget(lengths, by_length)]
    return parts


def _over_budget(by_method: dict[str, list[Parts]], names: Sequence[str]) -> str:
    rows = [
        [method, *(_over([parts.get(name) for parts in each]) for name in names)] for method, each in by_method.items()
    ]
    return _table(["", *names], rows)


def _over(parts: Sequence[dict[str, float] | None]) -> str:
    """Of the completions of the part in all seeds; its spread over seeds where each has more than a few."""
    there = [part for part in parts if part is not None]
    total = math.fsum(part["share"] for part in there)
    if not total:
        return ""
    over = math.fsum(part["share"] * (1 - part["within"]) for part in there) / total
    enough = len(there) == len(parts) and min(part["share"] for part in there) >= LEAST_PART
    half = interval_of([1 - part["within"] for part in there]).half if enough else math.nan
    return f"{text_of(Interval(over, half), 100.0)} ({100 * total / len(parts):.0f})"


def _failures(failed: Sequence[Line]) -> str:
    by_candidate: dict[str, list[str]] = {}
    for line in failed:
        why = readable(line.failure).replace("`", "'")
        by_candidate.setdefault(f"`{line.candidate}`", []).append(f"{line.situation}, seed {line.seed} (`{why}`)")
    return _items(by_candidate)


def _take(pictures: dict[str, str], name: str) -> list[str]:
    return [pictures[name]] if name in pictures else []


# ---------------------------------------------------------------------------------------------------- as a file


def csv_of(results: Results) -> str:
    """Means and half-widths of every setting in every situation, with full precision."""
    ends = ("", "_half_width")
    names = [column.name for column in COLUMNS] + ["regret"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heading = ["situation", "method", "candidate", "budget", "seeds", "feasible", "one_setting"]
    writer.writerow([*heading, *(f"{name}{end}" for name in names for end in ends)])
    for situation in results.situations:
        for setting in results.settings:
            lines = results.of(situation, setting)
            if not lines:
                continue
            budget = next(iter(lines.values())).budget
            flags = int(results.feasible(situation, setting)), int(setting == results.one_setting[setting.method])
            row: list[object] = [situation, *setting, budget, len(lines), *flags]
            for name in names:
                figure = (
                    results.regret(situation, setting) if name == "regret" else results.figure(situation, setting, name)
                )
                row += ["", ""] if figure is None else [figure.mean, "" if math.isnan(figure.half) else figure.half]
            writer.writerow(row)
    return text.getvalue()
