"""What the plots of a comparison show."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cmdp_fast.trainer.comparison import plots
from cmdp_fast.trainer.comparison.plan import Variant
from cmdp_fast.trainer.comparison.table import Estimate, TableRow
from cmdp_fast.trainer.settings.config import TrainConfig


@pytest.fixture(scope="module")
def undrawn() -> None:
    """Here figures are drawn."""


def test_no_teacher_is_drawn_where_there_is_none(tmp_path, monkeypatch):
    """The student before the training is the first row then, and keeps its colour and its mark."""
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    figures = dict.fromkeys(("accuracy", "constraint_satisfaction", "mean_cumulative_kl"), Estimate(0.5, 0.1))
    variants = [Variant(f"cmdp:budget={d}", "cmdp", {"budget": d}, TrainConfig(budget=d)) for d in (2.0, 0.5)]
    methods = [TableRow(variant.label, 2, variant.config, figures, variant) for variant in variants]
    before = [replace(methods[0], label=label, variant=None) for label in ("teacher", "student before")]
    for rows in ([*before, *methods], [before[1], *methods]):
        for plot in (plots.plot_budgets, plots.plot_bars, plots.plot_pareto):
            plot(tmp_path / "p.png", rows)
    (budgets, bars, pareto), (asked_budgets, asked_bars, asked_pareto) = drawn[:3], drawn[3:]
    lines = [[line.get_label() for line in figure.axes[0].lines] for figure in (budgets, asked_budgets)]
    assert "teacher" in lines[0] and "teacher" not in lines[1]
    colours = [[bar.get_facecolor() for bar in figure.axes[0].patches] for figure in (bars, asked_bars)]
    assert colours[1] == colours[0][1:]
    marks = [
        [(each[0].get_marker(), each[0].get_color()) for each in figure.axes[0].containers]
        for figure in (pareto, asked_pareto)
    ]
    assert marks[1] == marks[0][1:]
