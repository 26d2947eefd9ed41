"""A picture of a comparison: how much each method keeps of the teacher's ways, from the table of a comparison.

    python benchmarks/picture.py

reads benchmarks/results/training/tempting/table.csv, which `cmdp-fast compare` wrote, and draws
benchmarks/results/training/plots/steps.png. The task's reward is for the right answer and for brevity; nobody pays for
the steps. Shown are the teacher, the student before training and one method of each sort; the table has all methods.
"""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure

FOLDER = Path(__file__).parent / "results" / "training"
# The place of a name relative to its point, in points: in the left panel, and in the right panel.
SHOWN = {
    "teacher": ((10, -4), (10, -4)),
    "student before": ((-46, -16), (-40, 10)),
    "cmdp": ((-8, -18), (-8, -18)),
    "lagrangian:coefficient=0.001": ((-54, 10), (-54, 10)),
    "lagrangian:coefficient=0.005": ((-8, 10), (8, -14)),
    "grpo": ((8, -4), (8, -4)),
}
NAMES = {"lagrangian:coefficient=0.001": "KL weight 0.001", "lagrangian:coefficient=0.005": "KL weight 0.005"}
LOOKS = {"teacher": ("*", "black", 13), "student before": ("X", "0.45", 9), "cmdp": ("o", "C0", 10)}


def draw(path: Path, rows: dict[str, dict[str, str]]) -> None:
    """Two panels over the divergence: the rewarded share, and the share that keeps its steps. ``rows``: by method."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    columns = {
        "accuracy": "the answer is right (rewarded)",
        "reasoning_success": "every step is there and right (not rewarded)",
    }
    for place, (axes, (column, title)) in enumerate(zip(panels, columns.items(), strict=True)):
        budget = float(rows["cmdp"]["budget"])
        axes.axvspan(budget, 80, color="C3", alpha=0.08, lw=0)
        axes.axvline(budget, color="C3", ls="--", lw=1)
        axes.annotate(f"budget, {budget:g} nats", (budget, 0.25), (4, 0), textcoords="offset points", color="C3")
        for name, offsets in SHOWN.items():
            marker, colour, size = LOOKS.get(name, ("D", "C1", 7))
            point = float(rows[name]["mean_cumulative_kl"]), float(rows[name][column])
            axes.plot(*point, marker=marker, color=colour, ms=size, ls="", alpha=0.85)
            axes.annotate(NAMES.get(name, name), point, offsets[place], textcoords="offset points", fontsize=9)
        axes.set_title(title, fontsize=10)
        axes.set_xscale("symlog", linthresh=0.1, linscale=0.4)
        axes.set_xlim(-0.02, 80)
        axes.set_ylim(-0.08, 1.12)
        axes.set_xlabel("KL from the teacher (nats a completion)")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of held-out completions")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    with (FOLDER / "tempting" / "table.csv").open(encoding="utf-8", newline="") as lines:
        draw(FOLDER / "plots" / "steps.png", {row["method"]: row for row in csv.DictReader(lines)})
