"""Folders of runs as a training writes them, without a training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmdp_fast.digest import digests, write_sealed

SETTINGS: dict[str, Any] = {
    **{"recipe": "small", "method": "cmdp", "name": "", "output_dir": "runs", "resume": "", "keep": 2, "seed": 0},
    **{"task": "sums", "dataset": "", "budget": 2.0, "teacher_budgets": [], "budget_per_token": False},
    **{"cost": "reverse_kl", "kind": "cmdp", "algorithm": "ppo", "penalty": 1.0, "coefficient": 0.0, "steps": 20},
}
FIGURES = {"constraint_satisfaction": 0.9, "mean_cumulative_kl": 1.25, "mean_length": 12.5, "truncated": 0.25}
STEPS = [{"step": step, "reward": step / 20, "cmdp/cumulative_kl": 10 / step} for step in range(1, 21)]


def sample(who: str = "student_after", prompt: Any = "1+1=", completion: str = "A2", **others: Any) -> dict[str, Any]:
    """A line of `samples.jsonl`."""
    return {
        **{"who": who, "prompt": prompt, "completion": completion, "correct": True, "reward": 1.0, "length": 3},
        **{"finished": True, "cumulative": 0.5, "feasible": True, "cumulative_kl": 0.5},
        **others,
    }


def of_prompts(who: str, prompts: Sequence[Any], **others: Any) -> list[dict[str, Any]]:
    return [sample(who, prompt, f"{who} {prompt}", **others) for prompt in prompts]


def lines_of(values: Sequence[Any]) -> str:
    return "".join(value if isinstance(value, str) else json.dumps(value) + "\n" for value in values)


def write_run(
    folder: Path,
    samples: Sequence[Any] | None = (sample("student_before"), sample()),
    metrics: Sequence[Any] = STEPS,
    before: dict[str, Any] | None = FIGURES,
    after: dict[str, Any] | None = FIGURES,
    teacher: dict[str, Any] | None = None,
    summary: bool = True,
    began: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """A run's folder; of a value that is text the line itself. Without a ``summary`` it was stopped."""
    folder.mkdir(parents=True)
    beginning = began or {"code": {}, "origin": {"problems": "1"}, "processes": 1}
    write_sealed(folder / "config.json", {**SETTINGS, "name": folder.name, **settings, **beginning})
    (folder / "metrics.jsonl").write_text(lines_of(metrics))
    if samples is not None:
        (folder / "samples.jsonl").write_text(lines_of(samples))
    if summary:
        read = [name for name in ("metrics.jsonl", "samples.jsonl") if (folder / name).exists()]
        write_sealed(
            folder / "summary.json",
            {"teacher": teacher, "student_before": before, "student_after": after, "files": digests(folder, read)},
        )
    return folder
