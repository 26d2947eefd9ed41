"""What one setting is worth over several studies (benchmarks/together.py)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from cmdp_fast.trainer.comparison.study.lines import Line
from cmdp_fast.trainer.comparison.study.plan import Situation, Study, StudyMethod
from cmdp_fast.trainer.comparison.study.statistics import Results

pytest.importorskip("matplotlib", reason="draws")
SOURCE = Path(__file__).parents[2] / "benchmarks" / "together.py"
BEST, OTHER, ABSENT = "cmdp", "hinge:discrepancy_weight=0", "lagrangian:coefficient=0.1"


@pytest.fixture(scope="module")
def together():
    spec = importlib.util.spec_from_file_location("together", SOURCE)
    assert spec is not None and spec.loader is not None
    module = sys.modules["together"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["together"]


def study(name: str, scores: dict[str, dict[str, list[float]]], over: tuple[str, str] = ("", "")) -> Results:
    """Scores by situation and candidate, a seed after the other; ``over`` is a situation and a candidate beyond the
    budget."""
    candidates = dict.fromkeys(candidate for each in scores.values() for candidate in each)
    methods = tuple(StudyMethod(f"{name} {candidate}", (candidate,)) for candidate in candidates)
    lines = [
        Line(
            training=f"{situation}{candidate}{seed}",
            situation=situation,
            method=f"{name} {candidate}",
            candidate=candidate,
            seed=seed,
            budget=2.0,
            figures={
                "right_and_within": score,
                "within": 0.5 if (situation, candidate) == over else 1.0,
                "mean_kl": 1.0,
            },
        )
        for situation, each in scores.items()
        for candidate, values in each.items()
        for seed, score in enumerate(values)
    ]
    situations = tuple(Situation(name, {"reward_weights": [10, 10]} if name == "there" else {}) for name in scores)
    return Results(Study(name, "tempting", (0, 1), 0.95, {}, situations, methods, (), ""), lines)


@pytest.fixture
def studies() -> list[Results]:
    first = {
        "near": {BEST: [0.9, 0.8], OTHER: [0.86, 0.8], ABSENT: [0.1, 0.1]},
        "far": {BEST: [0.5, 0.5], OTHER: [0.6, 0.6], ABSENT: [0.1, 0.1]},
    }
    return [
        study("first", first, over=("far", OTHER)),
        study("second", {"there": {BEST: [0.7, 0.7], OTHER: [0.4, 0.5]}}),
    ]


def test_rows_are_the_settings_of_all_studies(together, studies):
    """Whatever a study calls them; the best of a situation is a feasible one, and regrets are paired by seed."""
    rows = together.rows_of(studies)
    assert [row.name for row in rows] == ["cmdp", "price alone"]
    best, other = rows
    assert best.worst == (0.0, "there") and not best.infeasible
    assert other.regrets["first", "near"] == pytest.approx({0: 4.0, 1: 0.0})
    assert other.regrets["first", "far"] == pytest.approx({0: -10.0, 1: -10.0})
    assert other.infeasible == {("first", "far")}
    assert other.worst == (pytest.approx(25.0), "there")
    assert other.mean("second").mean == pytest.approx(25.0)
    assert other.mean().mean == pytest.approx((2 - 10 + 25) / 3)
    assert other.gain_over(best) == pytest.approx(together.interval_of([-(4 - 10 + 30) / 3, -(0 - 10 + 20) / 3]))


def test_the_page_and_the_picture(together, studies):
    rows = together.rows_of(studies)
    page = together.page_of(studies, rows)
    heading = ["setting", "first (2)", "second (1)", "all", "more than cmdp", "worst", "worst, reward x 1"]
    assert f"| {' | '.join([*heading, 'within', 'least within'])} |" in page
    best, other = page.splitlines()[-2:]
    assert best.startswith("| cmdp | 0.0 ± 0.0 |") and best.endswith(
        "|  | 0.0 (there) | 0.0 (near) | 3 of 3 | 100.0 % (far) |"
    )
    assert other.startswith("| price alone | -4.0 ± ")
    assert other.endswith("25.0 (there) | 2.0 (near) | 2 of 3 | 50.0 % (far) |")
    (axes,) = together.drawn(studies, rows).axes
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["0", "0", "0", "0", "0", "2", "-10", "25", "25", "2", "first", "second"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cmdp", "price alone"]
    assert [patch.get_xy() for patch in axes.patches] == [(0.5, 0.5)]  # the second situation of the second row


@pytest.mark.parametrize(
    ("candidate", "name"),
    [
        ("gkd", "gkd"),
        ("cmdp:budget_price=0", "cmdp, no price"),
        ("lagrangian:coefficient=0.1", "lagrangian 0.1"),
        ("kl_loss:coefficient=1,kl_loss_correction=true", "kl_loss 1, with the ratio"),
    ],
)
def test_names(together, candidate, name):
    assert together.Row(candidate).name == name
