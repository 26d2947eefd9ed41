"""The curves of a run, `curves.png`."""

from __future__ import annotations

from pathlib import Path

from cmdp_fast.constraint import Constraint
from cmdp_fast.files import replacing

from .metrics_log import MetricsLog

# What is drawn: a training batch's figure, and that of an evaluation.
CURVES = (
    ("cmdp/accuracy", "accuracy"),
    ("cmdp/cumulative_kl", "mean_cumulative_kl"),
    ("cmdp/constraint_satisfaction", "constraint_satisfaction"),
)


def plot_curves(path: Path, log: MetricsLog, constraint: Constraint, teacher_accuracy: float | None) -> None:
    """Accuracy, cumulative KL, satisfaction: training batches as lines, evaluations, where they have such a figure, as
    dots; the teacher's accuracy as a line where it was evaluated."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    comparable = constraint.cost == "reverse_kl" and not constraint.per_token
    budget = constraint.budget if comparable else None
    panels = (
        ("accuracy", teacher_accuracy, "teacher"),
        ("cumulative KL (nats)", budget, "budget"),
        ("constraint satisfaction", None, ""),
    )
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (training, held_out), (title, level, label) in zip(figure.subplots(1, 3), CURVES, panels, strict=True):
        axes.plot([s["step"] for s in log.steps], [s[training] for s in log.steps], lw=1, alpha=0.7, label="training")
        evaluations = [e for e in log.evaluations if held_out in e]
        axes.plot([e["step"] for e in evaluations], [e[held_out] for e in evaluations], "o-", label="held out")
        if level is not None:
            axes.axhline(level, color="black", ls="--", lw=1, label=label)
        axes.set(title=title, xlabel="step")
        axes.set_ylim(bottom=0)
        axes.legend()
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=120)
