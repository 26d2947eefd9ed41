"""What a study's lines say (intervals, choice of settings, regret), and that its page and plots say it."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest

from cmdp_fast.trainer.comparison.study import plots
from cmdp_fast.trainer.comparison.study.intervals import Interval, holm, interval_of, p_value, share_inside
from cmdp_fast.trainer.comparison.study.lines import Line
from cmdp_fast.trainer.comparison.study.page import page_of, text_of, write_page
from cmdp_fast.trainer.comparison.study.plan import Kind, Situation, Study, StudyMethod
from cmdp_fast.trainer.comparison.study.statistics import Results, Setting, stand_correction

CMDP, LOW, HIGH = Setting("cmdp", "cmdp"), Setting("soft", "soft:weight=0.1"), Setting("soft", "soft:weight=1")
STUDY = Study(
    name="small",
    recipe="tempting",
    seeds=(0, 1, 2),
    feasible=0.9,
    settings={},
    situations=(Situation("first"), Situation("second", {"budget": 4.0})),
    methods=(StudyMethod("cmdp", ("cmdp",)), StudyMethod("soft", (LOW.candidate, HIGH.candidate))),
    kinds=(Kind("easy", "1"), Kind("hard", "")),
    text="# Decided before.\n#\n# - one thing\nrecipe = 'tempting'\n# not the head\n",
)


@pytest.fixture(scope="module")
def undrawn() -> None:
    """Here figures are drawn."""


def line(situation: str, setting: Setting, seed: int, score: float, within: float = 1.0, mean_kl: float = 1.0) -> Line:
    budget = 2.0 if situation == "first" else 4.0
    figures = {"accuracy": score, "within": within, "right_and_within": score, "mean_kl": mean_kl, "cvar_kl": 3.0}
    part = {"share": 0.5, "accuracy": score, "within": within, "mean_kl": mean_kl}
    return Line(
        training=f"{situation}{setting.candidate}{seed}",
        situation=situation,
        method=setting.method,
        candidate=setting.candidate,
        seed=seed,
        budget=budget,
        figures={**figures, "mean_length": 12.0, "examples": 64, "seconds": 1800.0},
        kl_quantiles=tuple(mean_kl * i / 10 for i in range(21)),
        kinds={"easy": part, "hard": {**part, "within": within / 2}},
        lengths={"9-16": part, "5-8": part},
    )


def lines(situation: str, setting: Setting, *scores: float, within: float = 1.0, mean_kl: float = 1.0) -> list[Line]:
    return [line(situation, setting, seed, score, within, mean_kl) for seed, score in enumerate(scores)]


SOME = [
    *lines("first", CMDP, 0.7, 0.8, 0.9),
    *lines("first", LOW, 0.8, 0.9, 0.97, within=0.5),
    *lines("first", HIGH, 0.6, 0.7, 0.7),
    *lines("second", CMDP, 0.7, 0.8, 0.9),
    *lines("second", LOW, 0.8, 0.95, 0.95),
    *lines("second", HIGH, 0.5, 0.5, 0.5),
]


# ---------------------------------------------------------------------------------------------------- intervals


def test_the_interval_of_three_numbers():
    """1, 2 and 6: mean 3, standard deviation √7, t of two degrees 4.302653 (any table of Student's t)."""
    mean, half = interval_of([1, 2, 6])
    assert mean == 3
    assert half == pytest.approx(4.302653 * math.sqrt(7 / 3), rel=1e-6)
    assert math.isnan(interval_of([5.0]).half)
    assert not interval_of([5.0]).apart_from_zero
    assert Interval(-3, 2).apart_from_zero and not Interval(2, 2).apart_from_zero


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (9, 2.262157), (30, 2.042272)],
)
def test_student_t(degrees: int, quantile: float):
    """The quantiles of 97.5 % of the tables."""
    assert share_inside(quantile, degrees) == pytest.approx(0.95, abs=1e-7)


def test_p_of_a_t_test():
    """With two degrees the p of t is 1 - t / √(2 + t²). Equal numbers say nothing of a spread."""
    t = 3 / math.sqrt(7 / 3)
    assert p_value([1, 2, 6]) == pytest.approx(1 - t / math.sqrt(2 + t**2))
    assert p_value([2.0, 2.0]) == p_value([0.0, 0.0]) == p_value([1.757, 1.758, 1.757], rounding=0.002) == 1
    assert p_value([1.757, 1.758, 1.757]) < 1e-5


def test_holm():
    """The smallest of four p's has to be below 0.05 / 4, the next below 0.05 / 3, and after the first that is not
    there is none."""
    assert holm([0.04, 0.001, 0.016, 0.03]) == 2
    assert holm([0.013, 0.013, 0.013, 0.013]) == 0
    assert holm([]) == 0


# ---------------------------------------------------------------------------------------------------- settings


def test_the_setting_is_chosen_on_the_first_situation_among_the_feasible():
    """The lower weight has the higher score there, and half of its completions over budget."""
    results = Results(STUDY, SOME)
    assert results.one_setting == {"cmdp": CMDP, "soft": HIGH}
    assert results.chosen("second", "soft") == LOW
    assert [results.best(situation) for situation in ("first", "second")] == [CMDP, LOW]


def test_the_lower_kl_decides_between_equals():
    """The same scores in another order are equal, although their floating-point means may differ."""
    tied = [*lines("first", LOW, 0.1, 0.2, 0.3, mean_kl=1.5), *lines("first", HIGH, 0.3, 0.1, 0.2, mean_kl=0.5)]
    assert Results(STUDY, tied).chosen("first", "soft") == HIGH
    assert Results(STUDY, tied[:3]).chosen("first", "soft") == LOW


def test_the_best_where_none_is_feasible():
    """It is the highest score, and the page says so, but not of a situation that has no figures yet."""
    over = [replace(each, figures={**each.figures, "within": 0.5}) for each in SOME]
    results = Results(STUDY, over)
    assert results.best("first") == LOW
    page = page_of(results, ["cmdp-fast"], "a machine")
    assert "No setting is feasible in first, second" in page and " | 0 of 2 |\n" in page
    assert "No setting is feasible" not in page_of(Results(STUDY, SOME[:9]), ["cmdp-fast"], "a machine")


def test_regret_is_paired_by_seed():
    """cmdp 0.7 0.8 0.9 against 0.6 0.7 0.7 on the first: 10, 10 and 20 points, a mean of 40/3 with the deviation
    10/√3. On the second the low weight is the best: 10, 15 and 5 points before cmdp, 30, 45 and 45 before the high."""
    cmdp, soft = Results(STUDY, SOME).regrets(one_setting=True)
    assert (cmdp.method, soft.method) == ("cmdp", "soft")
    assert cmdp.regrets["first"] == (0, 0)
    assert cmdp.regrets["second"] == pytest.approx((10, 4.302653 * 5 / math.sqrt(3)), rel=1e-6)
    assert soft.regrets["first"] == pytest.approx((40 / 3, 4.302653 * 10 / 3), rel=1e-6)
    assert soft.worst == pytest.approx(40)
    assert soft.mean == pytest.approx(interval_of([20, 27.5, 32.5]))
    best_of_each = {row.method: row for row in Results(STUDY, SOME).regrets(one_setting=False)}
    assert best_of_each["soft"].settings == {"first": HIGH, "second": LOW}
    assert best_of_each["soft"].regrets["second"] == (0, 0)


def test_settings_are_compared_over_the_seeds_that_both_have():
    """Without seed 0 of the one and seed 2 of the other, seed 1 is left: a difference without an interval."""
    some = [*lines("first", CMDP, 0.7, 0.8, 0.9)[1:], *lines("first", HIGH, 0.6, 0.7)]
    results = Results(STUDY, some)
    assert results.best("first") == CMDP
    mean, half = results.regret("first", HIGH)
    assert mean == pytest.approx(10) and math.isnan(half)
    assert results.regret("second", HIGH) is None


def test_a_failed_training_makes_its_setting_infeasible():
    """What a setting does where it fails is not known, so it is not chosen. Lines of other studies are left out."""
    failed = replace(SOME[8], figures={}, failure="RuntimeError: no `loss` | at all")
    results = Results(STUDY, [*SOME[:8], failed, *SOME[9:], replace(SOME[0], situation="another")])
    assert not results.feasible("first", HIGH) and results.feasible("first", CMDP)
    assert results.failed == [failed] and len(results.lines) == len(SOME) - 1


def test_methods_against_the_first():
    """10, 10 and 20 points behind: p is 0.057. 20, 30 and 40 behind on the second: p is 0.035, which does not stand a
    correction for two."""
    results = Results(STUDY, SOME)
    first, second = results.against_reference()
    assert (first.situation, first.method, second.situation) == ("first", "soft", "second")
    assert first.points.mean == pytest.approx(-40 / 3) and not first.apart
    assert second.points == pytest.approx((-30, 4.302653 * 10 / math.sqrt(3)), rel=1e-6)
    assert second.apart
    assert second.p == pytest.approx(1 - 30 / math.sqrt(2 * 100 / 3 + 900))
    assert stand_correction([first, second]) == 0 and stand_correction([second]) == 1


# ---------------------------------------------------------------------------------------------------- page and plots


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its tables, lists and files, from the lines in any order; twice the same."""
    monkeypatch.setenv("HOME", "/home/somebody")
    failed = replace(SOME[0], candidate=LOW.candidate, method="soft", figures={}, failure="no `loss` | at all")
    some = [failed, *SOME[:3], *SOME[4:]]
    (tmp_path / "runs.jsonl").write_text('{"study": "small", "machine": "a machine, python 3"}\n')
    write_page(
        tmp_path, STUDY, some, ["cmdp-fast", "compare", "--study", "my small.toml", "--output-dir=/home/somebody/x"]
    )
    page = (tmp_path / "README.md").read_text()
    for text in (
        "    cmdp-fast compare --study 'my small.toml' '--output-dir=~/x'\n",
        "a machine, python 3.",
        "seeds 0, 1, 2; 17 trainings",
        "8.5 hours",
        "64 held-out completions",
        "**1 of 18 lines are missing or failed.**",
        "> Decided before.\n>\n> - one thing\n\n",
        "| soft | 1 | 13.3 ± 14.3 | 40.0 ± 21.5 | 40.0 | 26.7 ± 15.6 | 2 of 2 |",
        "| soft | 13.3 ± 14.3 (1) | 0.0 ± 0.0 (0.1) | 13.3 | 6.7 ± 7.2 | 2 of 2 |",
        "**Worse than cmdp:**\n\n- soft: second (-30.0 ± 24.8)\n",
        "**Better than cmdp:**\n\nNone.",
        "**Not told apart:**\n\n- soft: first (-13.3 ± 14.3)\n",
        "about 0 of them would have one by chance; 0 stand Holm's",
        "| soft 0.1, the best here | 3 | 100.0 ± 0.0 | 90.0 ± 21.5 | 90.0 ± 21.5 | 1.00 ± 0.00 | 3.00 ± 0.00 | 12.0",
        "first, by kind of prompt:\n\n|  | easy | hard |",
        "| cmdp | 0.0 ± 0.0 (50) | 50.0 ± 0.0 (50) |",
        "first, by length in tokens:\n\n|  | 5-8 | 9-16 |",
        "- `soft:weight=0.1`: first, seed 0 (`no 'loss' | at all`)",
        "![regret](regret.png)",
        "![kl distribution](kl_distribution.png)",
        "![by kind](by_kind.png)",
    ):
        assert text in page, text
    assert "not the head" not in page and "frontier" not in page
    for name in ("regret.png", "kl_distribution.png", "by_kind.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(rows) == 6
    assert rows[2]["candidate"] == HIGH.candidate and rows[2]["one_setting"] == "1"
    assert float(rows[2]["regret"]) == pytest.approx(40 / 3)
    assert rows[1]["feasible"] == "0" and rows[0]["reasoning_success"] == ""
    assert page_of(Results(STUDY, some), ["x"], "m") == page_of(Results(STUDY, some[::-1]), ["x"], "m")


def test_trainings_that_keep_their_mean_alone():
    """Of the four one has a mean over the budget of 2 nats, and one 10 % over it, as is allowed here."""
    kept = [
        line("first", LOW, 0, 0.8, within=0.5, mean_kl=2.0),
        line("first", LOW, 1, 0.8, within=0.5, mean_kl=2.1),
        line("first", LOW, 2, 0.8, within=0.9, mean_kl=1.0),
        line("first", HIGH, 0, 0.8, within=0.899, mean_kl=0.1),
    ]
    page = page_of(Results(STUDY, kept), ["x"], "m")
    assert "and up to how many:\n\n- soft: first (2 of 3, up to 50.0 %)\n" in page


def test_the_page_of_one_seed():
    """There is no interval anywhere, and nothing is told apart."""
    results = Results(replace(STUDY, seeds=(1,)), SOME)
    page = page_of(results, ["cmdp-fast"], "a machine")
    assert "There is one seed" in page and "takes 3 seeds" in page
    assert "±" not in page and "| soft | 1 | 10.0 | 45.0 | 45.0 | 27.5 | 2 of 2 |" in page


def test_two_seeds_tell_nothing_apart():
    """The interval of two is 13 times their deviation, and scores are often equal to a completion."""
    results = Results(replace(STUDY, seeds=(0, 1)), [each for each in SOME if each.seed < 2])
    assert not any(difference.apart for difference in results.against_reference())
    assert "takes 3 seeds" in page_of(results, ["cmdp-fast"], "a machine")


def test_as_many_completions_more_in_every_seed_are_no_difference():
    """A line's shares are rounded, so such differences are not equal to the last digit."""
    more = [*lines("first", CMDP, 0.5, 0.50195, 0.50391), *lines("first", HIGH, 0.49609, 0.49805, 0.5)]
    (difference,) = Results(replace(STUDY, situations=STUDY.situations[:1]), more).against_reference()
    assert difference.points.mean == pytest.approx(-0.39, abs=0.01) and not difference.apart


def test_a_part_of_few_completions_has_no_spread():
    """Its completions of all seeds are taken together."""
    some = [
        replace(each, kinds={"easy": {"share": share, "accuracy": 1.0, "within": within, "mean_kl": 1.0}})
        for each, share, within in zip(
            lines("first", CMDP, 0.7, 0.8, 0.9), (0.002, 0.002, 0.004), (0, 1, 1), strict=True
        )
    ]
    assert "| cmdp | 25.0 (0) |" in page_of(Results(STUDY, some), ["x"], "m")


def test_the_page_of_one_situation(tmp_path: Path):
    """A setting that serves one situation is the best of it: there is no second table, and no picture of regret."""
    write_page(tmp_path, replace(STUDY, situations=STUDY.situations[:1]), SOME, ["cmdp-fast"])
    page = (tmp_path / "README.md").read_text()
    assert "## Regret" in page and "The best setting" not in page and "| soft | 1 | 13.3 ± 14.3 |" in page
    assert not (tmp_path / "regret.png").exists() and (tmp_path / "by_kind.png").exists()


def test_the_page_of_nothing_yet(tmp_path: Path):
    """A study of which every training failed has a page that says so, and no plots."""
    write_page(tmp_path, STUDY, [replace(each, figures={}, failure="killed") for each in SOME], ["cmdp-fast"])
    page = (tmp_path / "README.md").read_text()
    assert "18 of 18 lines are missing or failed" in page and "seed 2 (`killed`)" in page and ".png" not in page


def test_methods_that_keep_the_budget_on_average_alone():
    """A mean of 1 nat of 2, and half of the completions over it."""
    half = [replace(each, figures={**each.figures, "within": 0.5}) for each in SOME if each.candidate == "cmdp"]
    page = page_of(Results(STUDY, half), ["cmdp-fast"], "a machine")
    assert "- cmdp: first (mean 1.00 ± 0.00 of 2 nats, 50.0 ± 0.0 % over), second (mean" in page
    page = page_of(Results(STUDY, SOME), ["cmdp-fast"], "a machine")
    assert "of each method with its one setting:\n\nNone." in page


def test_numbers_have_no_signed_zero():
    assert text_of(Interval(-0.0004, 0.001), 100.0) == "0.0 ± 0.1"
    assert text_of(Interval(-0.0006, math.nan), 100.0) == "-0.1"
    assert text_of(None) == ""


def test_regret_is_drawn_by_the_worst_and_marked_where_over_budget():
    """Rows by the worst regret, a column for it, a hatched cell for each that is not feasible."""
    over = [replace(e, figures={**e.figures, "within": 0.5}) if e.situation == "second" else e for e in SOME]
    axes = plots.regret(Results(STUDY, over)).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["cmdp", "soft 1"]
    assert [text.get_text() for text in axes.texts] == ["0", "10", "10", "13", "40", "40"]
    assert sorted((patch.get_x(), patch.get_y()) for patch in axes.patches) == [(0.5, -0.5), (0.5, 0.5)]


def test_the_distribution_changes_its_colour_at_the_budget():
    """Quantiles up to 2 of 2 nats are within; up to 6 they are over it from 2 on."""
    (axes, *_) = plots.kl_distribution(Results(STUDY, lines("first", CMDP, 0.5, 0.5))).axes
    assert {drawn.get_color() for drawn in axes.lines} == {plots.WITHIN, "black"}
    (axes, *_) = plots.kl_distribution(Results(STUDY, lines("first", CMDP, 0.5, 0.5, mean_kl=3.0))).axes
    spans = {drawn.get_color(): list(drawn.get_xdata()) for drawn in axes.lines if drawn.get_linestyle() == "-"}
    assert spans == {plots.WITHIN: pytest.approx([0, 2.0]), plots.OVER: pytest.approx([2.0, 6.0])}
    marks = [drawn.get_color() for drawn in axes.lines if drawn.get_marker() == "|"]
    assert marks == [plots.WITHIN] * 7 + [plots.OVER] * 14


def test_the_frontier_is_for_situations_that_differ_in_budget_alone():
    """It has a curve per method by the budget; with one setting, and with the best of each budget."""
    assert not plots.budgets_alone(Results(STUDY, SOME))
    budgets = replace(STUDY, situations=(Situation("first", {"budget": 2}), Situation("second", {"budget": 4})))
    results = Results(budgets, SOME)
    assert plots.budgets_alone(results)
    one, _, best, _ = plots.frontier(results).axes
    cmdp, soft = one.containers
    assert list(cmdp.lines[0].get_xdata()) == [2.0, 4.0]
    assert list(cmdp.lines[0].get_ydata()) == pytest.approx([0.8, 0.8])
    assert list(soft.lines[0].get_ydata()) == pytest.approx([2 / 3, 0.5])
    assert list(best.containers[1].lines[0].get_ydata()) == pytest.approx([2 / 3, 0.9])


# ---------------------------------------------------------------------------------------------------- references


def test_teacher_and_student_before_stand_beside_the_methods():
    """They are no methods: nothing is chosen or best among them. Where the budget alone differs, the page says by how
    much each method is above its teacher: 20 points at 80 % for 60 %, 10 for each of its 2 nats."""
    frontier = replace(STUDY, situations=(Situation("first", {"budget": 2.0}), Situation("second", {"budget": 4.0})))
    teacher = [line(situation.name, Setting("teacher", ""), 0, 0.6, mean_kl=0.0) for situation in frontier.situations]
    before = line("first", Setting("student before", ""), 0, 0.1)
    some = [*lines("first", CMDP, 0.7, 0.8, 0.9, mean_kl=2.0), *lines("second", CMDP, 0.5, mean_kl=0.0)]
    results = Results(frontier, [*some, *teacher, before])
    assert results.best("first") == CMDP and len(results.lines) == 4
    page = page_of(results, ["cmdp-fast"], "here")
    assert page.count("| teacher |") == 2 and page.count("| student before |") == 1
    assert "| cmdp | 20.0 ± 24.8 (10) | -10.0 (no KL) |" in page
    assert "Above the teacher" not in page_of(Results(STUDY, [*SOME, *teacher]), ["cmdp-fast"], "here")


def test_a_table_by_the_tasks_reward():
    """Where every line has it: here the order of the methods is the other way round, and a setting is chosen by it."""
    rewarded = [
        replace(each, figures={**each.figures, "reward_within": 1.1 - each.figures["right_and_within"]})
        for each in SOME
        if each.situation == "first" and each.candidate != LOW.candidate
    ]
    page = page_of(Results(replace(STUDY, situations=(Situation("first"),)), rewarded), ["cmdp-fast"], "here")
    by_right, by_reward = page.split("## By the task's reward")
    assert "| soft | 1 | 13.3" in by_right and "| cmdp |  | 0.0" in by_right
    assert "| cmdp |  | 13.3" in by_reward and "| soft | 1 | 0.0" in by_reward
    assert "By the task's reward" not in page_of(Results(STUDY, SOME), ["cmdp-fast"], "here")
