"""Runs of one table that are alike in what they do not differ in: the problems, models and code of one name are one.

A comparison goes on with runs that were finished before. What they began with stands in their `config.json`
(`records/origin.py`, `records/trust.py`); settings alone would not tell of a file that has changed since.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from cmdp_fast.digest import Damaged, read_sealed
from cmdp_fast.errors import InputError

from ..records.trust import code_of
from ..settings.config import TrainConfig
from ..settings.task import TaskSettings
from .plan import SeededRun


def check_code(finished: Sequence[SeededRun]) -> None:
    """Raises InputError for a finished run whose functions are no longer in the files that it had."""
    for run in finished:
        recorded, now = _began(run.folder).get("code"), code_of(run.config)
        if now != recorded:
            known = recorded if isinstance(recorded, dict) else {}
            spec = next((name for name, digest in now.items() if known.get(name) != digest), "its code")
            raise InputError(f"{run.folder}: {spec} is not in the file that it was run with: {_remove(run.folder)}")


def check_origins(runs: Sequence[SeededRun]) -> None:
    """Raises InputError if two of some finished runs, those that were finished first in front, had other problems or
    models of the same name. Of a run that recorded none nothing is known."""
    first: dict[Any, tuple[Path, str]] = {}
    for run in runs:
        origin = _began(run.folder).get("origin")
        for what, digest in origin.items() if isinstance(origin, dict) else ():
            folder, known = first.setdefault((what, _named(run.config, what)), (run.folder, digest))
            if known != digest:
                raise InputError(
                    f"{folder} and {run.folder} had different {what if what == 'problems' else f'files of the {what}'} "
                    f"under the same name, and would stand in one table: {_remove(folder)}"
                )


def _named(config: TrainConfig, what: str) -> Any:
    if what != "problems":
        return getattr(config, what)
    names = [*(field.name for field in fields(TaskSettings)), "eval_dataset", "student"]  # whose tokens are counted
    return repr([getattr(config, name) for name in names])


def _began(folder: Path) -> dict[str, Any]:
    try:
        return read_sealed(folder / "config.json")
    except Damaged as error:
        raise InputError(f"{folder}: {error}: {_remove(folder)}") from error


def _remove(folder: Path) -> str:
    return f"remove {folder}, or choose another --output-dir"
