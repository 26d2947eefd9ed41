"""The sentences that the page and its Markdown have in common, without any markup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .chosen import Chosen, budget_of
from .groups import Group
from .measures import number
from .plot import window_of
from .runs import Run
from .samples import Sample
from .visible import short

MOST_LISTED = 12  # recipes, budgets or seeds that are named
NAME = 60


class Facts(NamedTuple):
    """What stands below a completion. `within` is None where no teacher says so, or one whose bounds leave it open;
    `open` says that they do, `crossed` is from where it is not."""

    reward: str
    spent: str
    length: str
    within: bool | None
    open: str
    crossed: str
    cut_off: bool


def title_of(groups: Sequence[Group]) -> str:
    """What the runs trained on."""
    return f"cmdp-fast report: {_listed([run.settings['recipe'] or _task(run) for run in _runs(groups)])}"


def lead_of(groups: Sequence[Group]) -> str:
    """What was run: tasks, budgets, methods and seeds."""
    runs = _runs(groups)
    budgets = _listed(
        [f"{run.budget:g} nats a {'token' if run.per_token else 'completion'} ({run.settings['cost']})" for run in runs]
    )
    seeds = [str(seed) for seed in sorted({run.seed for run in runs})]
    unfinished = [run for run in runs if not run.ended]
    parts = [
        f"task {_listed([_task(run) for run in runs])}",
        f"budget {budgets}",
        counted(len(groups), "method"),
        f"{'seed' if len(seeds) == 1 else 'seeds'} {_listed(seeds)}",
        *([f"{len(unfinished)} of {counted(len(runs), 'run')} not finished"] if unfinished else []),
    ]
    return " · ".join(parts)


def plot_words(groups: Sequence[Group]) -> str:
    """What the plot shows."""
    windows = {window_of(len(run.steps)) for run in _runs(groups)}
    mean = f" Each point is the mean of {_span(windows)} steps." if max(windows) > 1 else ""
    return (
        "Reward against cumulative KL over the training, of what a step sampled, one line for each run; "
        f"the mark is where it ends, the dashed line the budget.{mean}"
    )


def measure_words(groups: Sequence[Group]) -> str:
    """What the table shows."""
    several = any(len(group.ended or group.runs) > 1 for group in groups)
    spread = " Means over seeds, of those that came to their end, ± half of the 95 % t interval." if several else ""
    bounds = any("certified" in each for run in _runs(groups) for each in run.figures.values())
    lower = (
        " A teacher of most likely tokens gives bounds alone: cumulative KL and within budget are by the lower one, "
        "proven within budget by the upper one."
    )
    counts = {
        int(count) for run in _runs(groups) for figures in run.figures.values() if (count := figures.get("examples"))
    }
    more = f" They are {_span(counts)} a run: of more, fewer pairs of tokens are distinct." if len(counts) > 1 else ""
    return (
        f"Of completions of held-out problems.{more} Reward in training is the mean over the last tenth of the steps, "
        "which should agree with the held-out one. Perplexity is that of the completions under the teacher at the "
        f"temperature at which it is compared with.{spread}{lower if bounds else ''}"
    )


def sample_words(chosen: Chosen) -> str:
    """How the prompts were drawn, and whose completions are shown."""
    if not chosen.voices:
        return "No run has samples yet: they are written at the end of a training."
    which = " whose tokens' costs were kept" if chosen.with_costs else ""
    others = f"the {chosen.among} held-out prompts{which} that all columns have"
    drawn = f"All of {others}" if len(chosen.rows) == chosen.among else f"{len(chosen.rows)} of {others}"
    by = "" if len(chosen.rows) == chosen.among else f", drawn at random with seed {chosen.seed} and not picked"
    bounds = any(sample.certified is not None for row in chosen.rows for sample in row)
    lower = " Costs that are lower bounds, of a teacher that gives no others, are named “at least”." if bounds else ""
    return f"{drawn}{by}: the first completion of each, by the run with the method's smallest seed.{lower}"


def facts_of(sample: Sample, run: Run) -> Facts:
    """The facts below a completion."""
    budget = budget_of(sample, run)
    of = "" if budget is None else f" of {budget:.4g}"
    undecided = sample.feasible is True and sample.certified is False
    least = "" if sample.certified is None else "at least "
    return Facts(
        "not judged" if sample.reward is None else f"reward {sample.reward:.4g}",
        "" if sample.cumulative is None else f"{least}{number(sample.cumulative, 2)}{of} nats",
        counted(sample.length, "token"),
        None if undecided else sample.feasible,
        "within budget or not: its teacher gives bounds" if undecided else "",
        "" if sample.crossing is None else f" from token {sample.crossing + 1}",
        not sample.finished,
    )


def verdict_of(facts: Facts) -> str:
    """Whether a completion is within its budget."""
    within = f"within budget at its end, over it for a while{facts.crossed}" if facts.crossed else "within budget"
    return {True: within, False: f"OVER BUDGET{facts.crossed}", None: facts.open}[facts.within]


def _runs(groups: Sequence[Group]) -> list[Run]:
    return [run for group in groups for run in group.runs]


def _task(run: Run) -> str:
    return run.settings["task"] or run.settings["dataset"] or "?"


def _listed(texts: Sequence[str]) -> str:
    """The different ones of some texts, up to a dozen."""
    some = list(dict.fromkeys(short(text, NAME) for text in texts))
    more = len(some) - MOST_LISTED
    return ", ".join(some[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def counted(count: int, what: str) -> str:
    """A number of things."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _span(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"
