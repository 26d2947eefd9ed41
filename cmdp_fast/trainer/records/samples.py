"""The samples of a run's evaluations: `samples.jsonl`, and `samples.txt` to be read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cmdp_fast.errors import without_controls
from cmdp_fast.files import as_json, write_text


def write_samples(path: Path, samples: dict[str, list[dict[str, Any]]]) -> None:
    """JSON lines: every sample of each policy, by whom it is."""
    write_text(path, "".join(as_json({"who": who, **s}) + "\n" for who, some in samples.items() for s in some))


def samples_text(parts: Iterable[tuple[str, Sequence[dict[str, Any]]]]) -> str:
    """Completions as text for a terminal: a heading for each policy, then its samples, without control codes. Further
    lines of a sample begin with a mark."""
    lines = []
    for heading, samples in parts:
        lines += [heading, "=" * len(heading)]
        for s in samples:
            verdict = "not judged" if s["correct"] is None else "right" if s["correct"] else "wrong"
            account = ""  # where a teacher was asked about it
            if "cumulative" in s:
                within = "within budget" if s.get("certified", True) else "within budget by a lower bound"
                least = "at least " if "certified" in s else ""
                cost = "not finite" if s["cumulative"] is None else f"{s['cumulative']:.2f}"  # as JSON has it
                account = f", {least}{cost}, {within if s['feasible'] else 'OVER BUDGET'}"
            text = without_controls(f"{s['prompt']}  ->  {s['completion']}   [{verdict}{account}]")
            # A completion that ends a line begins none: it could write what looks like the next sample.
            lines.append(text.replace("\n", "\n  | ").encode(errors="replace").decode())
        lines.append("")
    return "\n".join(lines)
