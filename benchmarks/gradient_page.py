"""The page of `gradient_variance.py`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from cmdp_fast.files import write_json, write_text
from cmdp_fast.trainer.comparison.study.intervals import holm, interval_of, p_value
from cmdp_fast.trainer.comparison.study.page import text_of

CHANCE = 9.0  # a squared bias beyond so many times what chance makes of none counts as one: three deviations


def estimator_tables(rows: list[dict[str, Any]]) -> list[str]:
    """A table per problem and objective: a row per estimator, columns per policy."""
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    out = []
    for tokens, objective in dict.fromkeys((row["tokens"], row["objective"]) for row in rows):
        here = [row for row in rows if (row["tokens"], row["objective"]) == (tokens, objective)]
        out += ["", f"## `{objective}`, {tokens} tokens", ""]
        out.append("| estimator | " + " | ".join(f"{each}: variance | bias² | cosine" for each in policies) + " |")
        out.append("| --- |" + " --: |" * (3 * len(policies)))
        for estimator in dict.fromkeys(row["estimator"] for row in here):
            cells = []
            for policy in policies:
                (row,) = (each for each in here if (each["estimator"], each["policy"]) == (estimator, policy))
                biased = row["beyond"] > CHANCE
                cells += [f"{row['variance']:.3g}", f"{row['bias2']:.2g}" if biased else "0", f"{row['cosine']:.3f}"]
            out.append(f"| {estimator} | {' | '.join(cells)} |")
    return out


def long_term_table(rows: list[dict[str, Any]], completions: int) -> list[str]:
    """The error of an estimate with and without the long-term part: variance and squared bias, added."""
    out = [
        "| objective | tokens | policy | with: error | without: error | pays from |",
        "| --- | --: | --- | --: | --: | --: |",
    ]
    for without in (row for row in rows if row["estimator"] == "without the long-term part"):
        keys = ("objective", "tokens", "policy")
        (whole,) = (
            row for row in rows if row["estimator"] == "position_rloo" and all(row[k] == without[k] for k in keys)
        )
        saved = whole["variance"] - without["variance"]
        errors = [whole["variance"], without["variance"] + max(without["bias2"], 0.0)]
        pays = "no difference"
        if without["beyond"] > CHANCE:
            pays = f"{max(2, math.ceil(completions * saved / without['bias2']))} completions"
        cells = [f"`{without['objective']}`", str(without["tokens"]), without["policy"], *(f"{e:.3g}" for e in errors)]
        out.append(f"| {' | '.join([*cells, pays])} |")
    return out


def lost(rows: list[dict[str, Any]], row: dict[str, Any], name: str) -> list[float]:
    """How much more the whole gradient ends with than a row without a part of it, by seed."""
    keys = ("tokens", "start", "method")
    (whole,) = (each for each in rows if each["left out"] == "nothing" and all(each[k] == row[k] for k in keys))
    return [with_all - without for with_all, without in zip(whole[name], row[name], strict=True)]


def long_term_ends(rows: list[dict[str, Any]]) -> list[str]:
    """What the long-term part is worth at the end of training, by method."""
    out = []
    without = [row for row in rows if row["left out"] == "long-term part"]
    for method in dict.fromkeys(row["method"] for row in without):
        by_seed = [lost(rows, row, "score") for row in without if row["method"] == method]
        each = [interval_of(values) for values in by_seed]
        told = [interval for interval in each if interval.apart_from_zero]
        better, worse = (sum(sign * interval.mean > 0 for interval in told) for sign in (1, -1))
        means = [100 * interval.mean for interval in each]
        kept = holm([p_value(values) for values in by_seed]) if len(by_seed[0]) > 1 else 0
        out.append(
            f"- `{method}`: right and within changes by {min(means):.2f} to {max(means):.2f} points with it. Of "
            f"{len(each)} cases it helps in {better} and does harm in {worse}; the rest is not told apart. Holm's "
            f"correction keeps {kept}."
        )
        if method != "cmdp":  # whose objective jumps where training ends
            own = [100 * interval_of(lost(rows, row, "objective")).mean for row in without if row["method"] == method]
            out[-1] += f" Its own objective changes by {min(own):.2f} to {max(own):.2f}."
    return out


def ends_table(rows: list[dict[str, Any]]) -> list[str]:
    """A row per problem, start, method and what is left out."""
    out = [
        "| tokens | start | method | left out | right and within | reward | within budget | own objective "
        "| lost: right and within, x 100 | lost: own objective, x 100 |",
        "| --: | --- | --- | --- | --: | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        means = [f"{interval_of(row[name]).mean:.4f}" for name in ("score", "reward")]
        means += [f"{interval_of(row['within']).mean:.1%}", f"{interval_of(row['objective']).mean:.4f}"]
        differences = ["", ""]
        if row["left out"] != "nothing":
            intervals = [interval_of(lost(rows, row, name)) for name in ("score", "objective")]
            differences = [
                text_of(each, 100, 2) + ("" if each.apart_from_zero else " (not told apart)") for each in intervals
            ]
        names = [str(row["tokens"]), row["start"], f"`{row['method']}`", row["left out"]]
        out.append(f"| {' | '.join([*names, *means, *differences])} |")
    return out


def write(folder: Path, found: dict[str, Any]) -> None:
    """README.md and gradient.json in a folder."""
    settings, rows = found["settings"], found["estimators"]
    schedule = settings["schedule"]
    write_json(folder / "gradient.json", found)
    page = [
        "# What each estimator of the gradient is worth",
        "",
        f"`python benchmarks/gradient_variance.py --out benchmarks/results/study/gradient`: "
        f"{settings['repetitions']:,} estimates of {settings['completions']} completions each. {found['machine']}.",
        "",
        "The gradient itself is a sum over all paths. Variance is the trace of the covariance of one estimate, bias² "
        "the squared length of the bias, both in units of the gradient's squared length; a bias that chance explains "
        f"is 0 (its squared length is below {CHANCE:g} times what chance makes of none). Cosine is the mean of that "
        "between one estimate and the gradient. The head of the script says what is estimated.",
        *estimator_tables(rows),
        "",
        "## The long-term part (future KL): bias against variance",
        "",
        "Without it an estimate has less variance and a bias. The error is the sum of variance and bias². The variance "
        f"falls with the number of completions, {settings['completions']} here, and the bias does not: with so many "
        "completions and more, the estimate with the long-term part is the better one.",
        "",
        *long_term_table(rows, settings["completions"]),
        "",
        "## Where training ends without a part of the gradient",
        "",
        f"{settings['seeds']} seeds, {schedule['steps']} steps of {schedule['completions']} completions. Right and "
        "within: the reward of paths within budget (a path over it pays 0), exact over all paths. The last columns: "
        "how much more the whole gradient ends with, paired by seed, with the 95% t interval. The objective of `cmdp` "
        "jumps at the budget, where its training ends: a hair above it the reward is lost. Its penalty acts through "
        "the long-term part alone, since a crossing does not depend on the action there: without that part it is gone.",
        "",
        "What the long-term part is worth:",
        "",
        *long_term_ends(found["ends"]),
        "",
        *ends_table(rows=found["ends"]),
    ]
    write_text(folder / "README.md", "\n".join(page) + "\n")
