"""What a phase of `benchmarks/gpu.py` has left, read for the pages.

A record is the JSON of one phase: its machine, and its parts, each done, failed, absent or left out. A part that timed
a case holds it as `result`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmdp_fast.bench.results import CaseResult, case_of
from cmdp_fast.errors import InputError, first_line

FORMAT = 1
FOLDERS = "gpu-*"  # of the results, one per card; gpu-static holds no records


@dataclass(frozen=True)
class PhaseRecord:
    """A phase on a machine. ``parts`` are as they stand in the JSON."""

    phase: str
    command: str
    small: bool
    began: str
    seconds: float | None
    machine: dict[str, Any]
    parts: list[dict[str, Any]]

    @property
    def card(self) -> str | None:
        """The name of the GPU; None for toy sizes on a CPU, which say nothing about one."""
        gpu = self.machine.get("gpu")
        return None if self.small or gpu is None else str(gpu["name"])

    @property
    def cases(self) -> list[CaseResult]:
        """The cases that were timed, also where a check beside them failed."""
        return [case_of(part["result"]) for part in self.parts if "result" in part]


def is_record(path: Path) -> bool:
    """Whether a JSON file is that of a phase."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return False
    return isinstance(content, dict) and "phase" in content


def read_record(path: Path) -> PhaseRecord:
    """A record from its JSON. Raises InputError for any other file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise InputError(f"{path}: expected the JSON of benchmarks/gpu.py, format {FORMAT}")
        names = ("phase", "command", "small", "began", "parts")
        record = PhaseRecord(
            **{name: found[name] for name in names}, seconds=found.get("seconds"), machine=found["machine"] or {}
        )
        record.cases  # noqa: B018  (read now, so that a broken file is told by its name)
        return record
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected the JSON of benchmarks/gpu.py: {first_line(error)}") from error


def measured_on_gpus(results: Path) -> dict[str, list[PhaseRecord]]:
    """The records with timed cases of every card, by its folder's name. Raises InputError for a broken one."""
    found: dict[str, list[PhaseRecord]] = {}
    for folder in sorted(results.glob(FOLDERS)):
        records = [read_record(path) for path in sorted(folder.glob("*.json")) if is_record(path)]
        if timed := [record for record in records if record.card and record.cases]:
            found[folder.name] = timed
    return found


def first_cases(records: Sequence[PhaseRecord], wanted: Sequence[tuple[str, str]]) -> list[CaseResult]:
    """For each operation and mode the first case, which is the most important one, beside others if there is such."""
    cases = [case for record in records for case in record.cases]
    chosen = []
    for key in wanted:
        some = [case for case in cases if (case.op, case.mode) == key and case.dtype == "bfloat16"]
        if some:
            same = [case for case in some if case.shape == some[0].shape]
            chosen.append(next((case for case in same if any(v.peer for v in case.variants)), same[0]))
    return chosen
