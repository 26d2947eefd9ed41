"""The figures of a step and of an evaluation, in words for the console."""

from __future__ import annotations

from cmdp_fast.constraint import Constraint


def of_step(metrics: dict[str, float], constraint: Constraint) -> list[str]:
    """The figures beside the progress: budget use is the mean cumulative cost as a share of the budget."""
    budget = constraint.budget * (metrics["completions/mean_length"] if constraint.per_token else 1.0)
    return [
        f"reward {metrics['reward']:.2f}",
        f"budget use {metrics['cmdp/mean_cumulative'] / budget:.0%}",
        f"KL {metrics['cmdp/cumulative_kl']:.2f}",
        f"{metrics['tokens_per_second']:.0f} tokens/s",
    ]


def of_evaluation(result: dict[str, float]) -> str:
    """Figures of an evaluation, fit for a line of 80 columns behind the name of whose they are."""
    figures = [f"accuracy {result['accuracy']:.1%}"]
    if "mean_cumulative_kl" in result:  # compared with the teacher, where it says something of any completion
        figures.append(f"within budget {result['constraint_satisfaction']:.1%}")
        figures.append(f"KL {result['mean_cumulative_kl']:.2f}")
    return "  ".join([*figures, f"length {result['mean_length']:.1f}"])
