"""The table of `cmdp-fast report`, what its rows are called, and its plot."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from report_pages import Page, groups, markdown_in, quiet, report
from written_runs import FIGURES, SETTINGS, STEPS, sample, write_run

from cmdp_fast.trainer.run_report import plot
from cmdp_fast.trainer.run_report.groups import groups_of
from cmdp_fast.trainer.run_report.measures import COLUMNS, rows_of, text_of
from cmdp_fast.trainer.run_report.plot import plot_png, way_of
from cmdp_fast.trainer.run_report.runs import Run, Step, read_runs
from cmdp_fast.trainer.run_report.visible import short
from cmdp_fast.trainer.run_report.words import measure_words


@pytest.fixture(scope="module")
def undrawn() -> None:
    """Here figures are drawn."""


def test_seeds_of_a_method_are_one_row_with_its_interval(tmp_path):
    """1, 2 and 6: mean 3, standard deviation √7, t of two degrees 4.302653 (any table of Student's t)."""
    folders = [
        write_run(
            tmp_path / f"s{seed}",
            [sample("student_before", reward=0.5), sample(reward=value), sample(reward=value)],
            after={**FIGURES, "constraint_satisfaction": value / 10, "distinct_2": 0.5},
            seed=seed,
            keep=seed + 1,
        )
        for seed, value in ((2, 6.0), (0, 1.0), (1, 2.0))
    ]
    (group,) = groups(*folders)
    assert group.label == "cmdp" and [run.seed for run in group.runs] == [0, 1, 2]
    before, method = rows_of([group])
    half = 4.302653 * math.sqrt(7 / 3)
    assert method.figures["reward"] == (3.0, pytest.approx(half, rel=1e-6))
    assert method.figures["ended"] == (0.75, 0.0) and method.seeds == "3"
    page = Page(report(*folders, output=tmp_path / "out"))
    assert "3.000 ± 6.572" in page.text and "30.0 ± 65.7" in page.text and "50.0 ± 0.0" in page.text
    assert "| cmdp | 3 | 3.000 ± 6.572 | 0.975 ± 0.000 | 30.0 ± 65.7 | 1.25 ± 0.00 |" in markdown_in(tmp_path / "out")
    assert "± half of the 95 % t interval" in page.text
    assert before.label == "student before" and before.figures["reward"].mean == 0.5
    assert math.isnan(before.figures["reward"].half), "one evaluation, whatever the number of seeds"
    assert "student before |  | 0.500 | – | 90.0 |" in markdown_in(tmp_path / "out")


def test_the_reward_in_training_is_that_of_the_last_tenth(tmp_path):
    (group,) = groups(write_run(tmp_path / "r"))
    assert rows_of([group])[-1].figures["reward_in_training"].mean == pytest.approx((0.95 + 1.0) / 2)
    few = [{**STEPS[0], "reward": 3.0}, {**STEPS[1], "reward": 0.25}]
    (group,) = groups(write_run(tmp_path / "few", metrics=few))
    assert rows_of([group])[-1].figures["reward_in_training"].mean == 0.25


def test_the_teacher_has_a_row_where_it_differs(tmp_path):
    other = {**FIGURES, "mean_length": 20.0}
    folders = [write_run(tmp_path / f"{i}", teacher=t, seed=i) for i, t in enumerate((FIGURES, other))]
    assert [[row.label for row in rows_of(groups(f))] for f in folders[1:]] == [["student before", "teacher", "cmdp"]]
    same = [sample(who, reward=0.5) for who in ("teacher", "student_before", "student_after")]
    assert [row.label for row in rows_of(groups(write_run(tmp_path / "same", same, teacher=FIGURES)))] == [
        *("student before", "cmdp")
    ]


def test_the_student_before_has_a_row_for_each_budget(tmp_path):
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", before={**FIGURES, "constraint_satisfaction": 1.0}, budget=4.0)
    labels = [row.label for row in rows_of(groups(one, two))]
    assert labels[:2] == ["student before (cmdp, budget 2)", "student before (cmdp, budget 4)"]


def test_figures_of_different_numbers_of_completions_are_named(tmp_path):
    """Distinct-n falls with their number."""
    runs = [
        write_run(tmp_path / kind, method=kind, kind=kind, after={**FIGURES, "examples": count})
        for kind, count in (("cmdp", 64), ("hinge", 128))
    ]
    assert "They are 64 to 128 a run: of more, fewer pairs of tokens are distinct." in measure_words(groups(*runs))
    assert "a run" not in measure_words(groups(runs[0]))


def test_what_is_by_bounds_says_so(tmp_path):
    proven = groups(write_run(tmp_path / "topk", after={**FIGURES, "certified": 0.5}))
    assert "within budget are by the lower one, proven within budget by the upper one" in measure_words(proven)
    assert "bounds" not in measure_words(groups(write_run(tmp_path / "exact")))


def test_a_large_number_has_an_exponent():
    reward = COLUMNS[0]
    assert text_of(rows_of_reward(12345.0), reward) == "12345.000"
    assert text_of(rows_of_reward(-3e38), reward) == "-3e+38"


def rows_of_reward(value: float) -> Any:
    run = Run(Path("r"), dict(SETTINGS), {"code": {}, "origin": {}}, (Step(value, 1.0),), {}, {})
    figures = rows_of(groups_of([run]))[0].figures["reward_in_training"]
    assert figures.mean == value
    return figures


def test_what_methods_are_called(tmp_path):
    soft = {"method": "lagrangian", "kind": "lagrangian"}
    folders = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", **soft, coefficient=0.1),
        write_run(tmp_path / "c", **soft, coefficient=0.02),
        write_run(tmp_path / "d", method="", kind="hinge"),
        write_run(tmp_path / "e", method="own/mine.toml", steps=40),
        write_run(tmp_path / "f", method="own/mine.toml", steps=40, began={"code": {"f": "1"}, "origin": {}}),
    ]
    a, b, c, d, e, f = (group.label for group in groups(*folders))
    assert (a, b, c) == (
        "cmdp, steps 20",
        "lagrangian, coefficient 0.1, steps 20",
        "lagrangian, coefficient 0.02, steps 20",
    )
    assert d == "hinge, steps 20" and e != f
    assert re.fullmatch("mine, steps 40, files [0-9a-f]{8}", e) and re.fullmatch("mine, steps 40, files [0-9a-f]{8}", f)


def test_a_lone_setting_of_a_method_is_named_where_it_is_not_its_own(tmp_path):
    """`lagrangian` has 0.1 in its file: another coefficient is named beside any other method."""
    soft = {"method": "lagrangian", "kind": "lagrangian"}
    cmdp = write_run(tmp_path / "cmdp")
    assert groups(cmdp, write_run(tmp_path / "own", **soft, coefficient=0.1))[1].label == "lagrangian"
    changed = groups(cmdp, write_run(tmp_path / "changed", **soft, coefficient=0.3))
    assert [group.label for group in changed] == ["cmdp", "lagrangian, coefficient 0.3"]


def test_a_comparison_is_all_of_its_runs_and_a_run_is_there_once(tmp_path, capsys):
    comparison = tmp_path / "comparisons" / "c"
    for seed in (0, 1):
        write_run(comparison / "runs" / f"cmdp-seed{seed}", seed=seed)
    (comparison / "runs" / "begun").mkdir()
    (comparison / "runs" / ".hidden").mkdir()
    (comparison / "runs" / "note.txt").write_text("")
    report(comparison, comparison / ".." / "c" / "runs" / "cmdp-seed1", output=tmp_path / "out")
    out = capsys.readouterr().out
    assert "begun: no config.json, left out" in out and ".hidden" not in out and "2 runs, 1 method, 1 prompt" in out


def test_a_run_that_was_stopped_has_its_line_alone(tmp_path, capsys):
    stopped = write_run(tmp_path / "a", None, [*STEPS[:5], '{"step": 6, "rew'], summary=False, seed=1)
    (run,) = read_runs([str(stopped)], quiet)
    assert len(run.steps) == 5 and not run.ended
    page = Page(report(stopped, output=tmp_path / "one"))
    assert "the last line is not whole and is dropped" in capsys.readouterr().out
    assert "1 of 1 run not finished" in page.text and "No run has samples yet" in page.text
    page = Page(report(stopped, write_run(tmp_path / "b"), output=tmp_path / "two"))
    assert "1 of 2 runs not finished" in page.text
    assert "| cmdp | 1 of 2 | 1.000 | 0.975 |" in markdown_in(tmp_path / "two")
    begun = write_run(tmp_path / "begun", None, (), summary=False)
    (begun / "metrics.jsonl").unlink()
    Page(report(begun, output=tmp_path / "three"))


# ------------------------------------------------------------------------------------------------------ the plot


def test_a_long_run_is_drawn_by_some_of_its_points(monkeypatch):
    """And both of its ends are among them."""
    monkeypatch.setattr(plot, "POINTS", 5)
    steps = tuple(Step(float(n), float(n)) for n in range(1000))
    kl, reward = way_of(Run(Path("r"), {}, {}, steps, {}, {}))
    assert len(kl) == 5 and kl == reward == sorted(kl)
    window = plot.window_of(1000)
    assert kl[0] == (window - 1) / 2 and kl[-1] == 999 - (window - 1) / 2


@pytest.mark.parametrize(("budget", "furthest"), [(1e-12, 1e100), (2.0, 7.0), (20.0, 60.0)])
def test_ticks_of_any_budget(budget, furthest):
    ticks = plot._ticks(budget, furthest)
    assert ticks[:3] == [0.0, budget / 2, budget] and len(ticks) <= 10 and ticks == sorted(ticks)


def test_a_line_is_of_running_means():
    steps = tuple(Step(reward=float(i), cumulative_kl=None if i == 3 else 2.0 * i) for i in range(41))
    run = Run(Path("r"), dict(SETTINGS), {"code": {}, "origin": {}}, steps, {}, {})
    kl, reward = way_of(run)
    assert len(kl) == 39 and (kl[0], reward[0]) == (1.0, 0.5) and (kl[-1], reward[-1]) == (79.0, 39.5)


@pytest.mark.parametrize("label", ["$x^{2$", "_hidden", "\u202etxet \x1b[2J", "漢字 \ud800", "", "%s {0} \\frac"])
def test_a_label_is_drawn_as_it_is(label, monkeypatch):
    steps = (Step(1.0, 1e99), Step(None, None), Step(-1e99, 0.0))
    run = Run(Path("r"), {**SETTINGS, "method": label}, {"code": {}, "origin": {}}, steps, {}, {})
    made = groups_of([run])
    drawn = []
    monkeypatch.setattr(plot.Figure, "savefig", lambda figure, file, **_: drawn.append(figure))
    plot_png(made)
    shown, budget = (text.get_text() for text in drawn[0].legends[0].get_texts())
    assert shown == short(made[0].label, plot.LONGEST_LABEL) and budget == "budget 2"
    monkeypatch.undo()
    assert plot_png(made).startswith(b"\x89PNG")
