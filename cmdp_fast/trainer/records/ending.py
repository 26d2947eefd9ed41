"""How a run says that it has ended: `summary.json`, written last, which names the files written before it.

An end that was interrupted leaves an older one or none, and is made again from the last checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cmdp_fast.digest import Damaged, check_digests, digests, read_sealed, write_sealed

SUMMARY = "summary.json"
WRITTEN = ("metrics.jsonl", "samples.jsonl", "samples.txt", "curves.png", "student")
PHASES = ("rollout", "scoring", "update")  # of a step: their seconds are those of the training
LARGEST = 1e100  # of a figure: what is larger has no standard error


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """The last file of a run, with the sha256 of the others. Raises InputError if it cannot be written.

    Where no student was written, `student_step` is that of an older one that is still there.
    """
    files = digests(folder, [name for name in WRITTEN if (folder / name).exists()])
    if summary["student_step"] is None:
        summary = {**summary, "student_step": _step_of_older(folder, files)}
    write_sealed(folder / SUMMARY, {**summary, "files": files})


def _step_of_older(folder: Path, files: dict[str, str]) -> int | None:
    """The step of the student that an older summary has sealed, if it is the one that is there now."""
    try:
        older = read_sealed(folder / SUMMARY)
        step, students = older["student_step"], [_of_student(each) for each in (older["files"], files)]
    except (Damaged, KeyError, AttributeError):
        return None
    return step if isinstance(step, int) and students[0] and students[0] == students[1] else None


def _of_student(files: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in files.items() if name.startswith("student/")}


def finished_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a run that has come to its end, with all that it left still as it was; None if it has not yet.

    Raises Damaged, which names it, if one of the files is gone or no longer as it was written.
    """
    path = folder / SUMMARY
    if not path.exists():
        return None
    summary = read_sealed(path)
    try:
        if summary["interrupted"] or summary["error"] is not None or summary["student_after"] is None:
            return None
        kinds = {"steps": int, "config": dict, "student_after": dict, "files": dict, "seconds": dict}
        fits, files = all(isinstance(summary[name], kind) for name, kind in kinds.items()), summary["files"]
        tables = [summary[name] for name in ("student_after", "seconds", "teacher", "student_before")]
        fits = fits and all(_are_figures(table) for table in tables if table is not None)
        fits = fits and all(summary["seconds"][phase] is not None for phase in PHASES)
    except KeyError as error:
        raise Damaged(f"{SUMMARY} lacks {error}") from error
    check_digests(folder, files)
    lacking = [name for name in WRITTEN if not any(file == name or file.startswith(f"{name}/") for file in files)]
    if lacking or not fits:
        raise Damaged(f"{SUMMARY} is not that of a run" + (f": it does not name {lacking[0]}" if lacking else ""))
    return summary


def _are_figures(table: Any) -> bool:
    """Whether a value is a table of numbers; None stands for one that was not finite."""
    return isinstance(table, dict) and all(value is None or is_number(value) for value in table.values())


def is_number(value: Any) -> bool:
    """Whether a value out of JSON is a number, and one of which there are statistics."""
    return type(value) in (int, float) and abs(value) <= LARGEST
