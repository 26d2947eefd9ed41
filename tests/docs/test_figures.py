"""What the guides show of a terminal, and the names of the figures that they speak of, are those of the trainer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import readme_given

from cmdp_fast.constraint import Constraint
from cmdp_fast.trainer.records.figures import of_evaluation, of_step

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "cmdp_fast" / "guide"
PAGES = [page for folder in ("cmdp_fast", "benchmarks") for page in sorted((ROOT / folder).rglob("*.md"))]
STEP = re.compile(r"^  \d+/\d+  (.*)  \d+ s left$", re.MULTILINE)
EVALUATION = re.compile(r"^(teacher|student_before|student_after) +(accuracy .*)$", re.MULTILINE)
NUMBER = re.compile(r"(-?[\d.]+)(%?)")
GPU = {"perf/max_memory_allocated_gb"}  # which a machine without one does not write


def number(label: str, line: str) -> float:
    """The number behind a label of a line, or before it; of a percentage the share."""
    found = re.search(rf"(?:^|  ){label} {NUMBER.pattern}(?=  |$)|(?:^|  ){NUMBER.pattern} {label}(?=  |$)", line)
    assert found, f"nothing of {label!r} in: {line}"
    value, percent = next((v, p) for v, p in (found.group(1, 2), found.group(3, 4)) if v)
    return float(value) / 100 if percent else float(value)


def as_step(line: str) -> str:
    metrics = {
        "reward": number("reward", line),
        "cmdp/mean_cumulative": 2.0 * number("budget use", line),
        "cmdp/cumulative_kl": number("KL", line),
        "tokens_per_second": number("tokens/s", line),
    }
    return "  ".join(of_step(metrics, Constraint(budget=2.0)))


def as_evaluation(line: str) -> str:
    return of_evaluation(
        {
            "accuracy": number("accuracy", line),
            "constraint_satisfaction": number("within budget", line),
            "mean_cumulative_kl": number("KL", line),
            "mean_length": number("length", line),
        }
    )


def shown() -> list[tuple[Path, str, str]]:
    """(page, line, the same line as the trainer would print it) of each line of a run that a page shows."""
    lines = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines += [(page, found[1], as_step(found[1])) for found in STEP.finditer(text)]
        lines += [(page, found[0], f"{found[1]:<15}{as_evaluation(found[2])}") for found in EVALUATION.finditer(text)]
    return lines


def test_the_lines_of_a_run_are_as_it_prints_them():
    lines = shown()
    assert len(lines) >= 12
    for page, line, printed in lines:
        assert line == printed, page.name


@pytest.mark.parametrize(("page", "column"), [("tutorial", 0), ("budget", 1)])
def test_the_labels_to_look_for_are_printed(page, column):
    """Those of the table that explains them; the names of whose figures they are stand before the line."""
    text = (GUIDE / f"{page}.md").read_text(encoding="utf-8")
    table = text.partition("\n| figure |")[2].partition("\n\n")[0].splitlines()[2:]
    line = of_evaluation(
        dict.fromkeys(("accuracy", "constraint_satisfaction", "mean_cumulative_kl", "mean_length"), 0.5)
    )
    named = {name for row in table for name in re.findall(r"`([^`]+)`", row.strip("|").split("|")[column])}
    named -= {"student_before", "student_after", "--method grpo", "--method gkd", "minillm"}
    assert named and all(f"{name} " in line for name in named), (named, line)


def test_the_columns_to_look_at_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme_given.a_run()
    (line,) = Path("runs/mine/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    for page, least in (("troubleshooting", 8), ("budget", 2)):
        text = (GUIDE / f"{page}.md").read_text(encoding="utf-8")
        named = set(re.findall(r"`((?:cmdp|clip_ratio|completions|loss|perf|timing_s)/\w+)`", text))
        assert len(named) >= least and named <= json.loads(line).keys() | GPU
