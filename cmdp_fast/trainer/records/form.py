"""The form of what a checkpoint holds beside tensors: anybody may have written it."""

from __future__ import annotations

from typing import Any

from .curves import CURVES
from .ending import is_number


def check_records(state: dict[str, Any], evaluated_before: bool) -> None:
    """Raises ValueError or KeyError unless a checkpoint's records are of the form that `Training` writes."""
    steps = [record["step"] for name in ("metrics", "evaluations") for record in state[name]]
    evaluated = {who for who in ("teacher", "student_before") if who in state["results"]}
    evaluated |= {"student_before"} if evaluated_before else set()
    figures = [state["results"][who]["accuracy"] for who in evaluated]
    samples = [sample for some in state["samples"].values() for sample in some]
    costs = [sample.get("cumulative") for sample in samples]  # None: no teacher was asked, or it was not finite
    drawn = [record[name] for name, _ in CURVES for record in state["metrics"]]
    drawn += [record.get(name) for _, name in CURVES for record in state["evaluations"]]  # some are without a teacher
    if not (
        all(value is None or is_number(value) for value in [*drawn, *costs])  # None: it was not finite
        and all(map(is_number, state["seconds"].values()))
        and type(state["ppo"]["tokens_seen"]) is int
        and all(type(step) is int for step in [state["ppo"]["steps_done"], *steps])
        and all(isinstance(figure, float) for figure in figures)
        and all(isinstance(sample["completion"], str) and {"prompt", "correct"} <= sample.keys() for sample in samples)
        and all("cumulative" not in sample or "feasible" in sample for sample in samples)
        and state["ppo"]["steps_done"] == len(state["metrics"]) > 0
    ):
        raise ValueError("its records are of another form")


def form_of(value: Any) -> Any:
    """What kind of values stand where in a value out of JSON."""
    if isinstance(value, dict):
        return {name: form_of(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [form_of(each) for each in value]
    return "number" if type(value) in (int, float) else type(value).__name__
