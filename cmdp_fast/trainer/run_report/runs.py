"""The folders of trainings, finished or stopped: their settings, their steps, their figures and their samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cmdp_fast.digest import Damaged, check_digests, read_sealed
from cmdp_fast.errors import InputError, readable, shown

from ..records.ending import SUMMARY
from .reading import LONGEST_FILE, LONGEST_LINES, Place, as_number, check_regular, is_there, number, of_type, tables
from .samples import WHO, Policy, index_of

MOST = 1000  # runs of a report
LEAST_BUDGET = 1e-12  # nats: far below the rounding of a KL

Figures = dict[str, float]


class Step(NamedTuple):
    """A training step's mean reward and mean cumulative KL in nats; None: not a finite number."""

    reward: float | None
    cumulative_kl: float | None


@dataclass(frozen=True)
class Run:
    """What a training has written. `figures` are those of `summary.json` by policy, none of one that was not evaluated;
    `began` is what `config.json` says of code, problems and models."""

    folder: Path
    settings: dict[str, Any]
    began: dict[str, Any]
    steps: tuple[Step, ...]
    figures: dict[str, Figures]
    samples: dict[str, Policy]

    @property
    def seed(self) -> int:
        return self.settings["seed"]

    @property
    def budget(self) -> float:
        """In nats, of a completion or of each of its tokens."""
        return self.settings["budget"]

    @property
    def per_token(self) -> bool:
        return self.settings["budget_per_token"]

    @property
    def draws_budget(self) -> bool:
        """Whether the budget is one of cumulative KL, as a plot has it."""
        return self.settings["cost"] == "reverse_kl" and not self.per_token and not self.settings["teacher_budgets"]

    @property
    def ended(self) -> bool:
        """Whether the student was evaluated after the training."""
        return "student_after" in self.figures or "student_after" in self.samples


def read_runs(places: Sequence[str], say: Callable[[str], None]) -> list[Run]:
    """The runs in these folders, each a run's or a comparison's; one that is named twice is there once. Raises
    InputError for a folder that is neither, and for a file in it that is not as a training writes it."""
    folders: dict[Path, Path] = {}
    for place in places:
        for folder in _folders(Path(place), say):
            folders.setdefault(folder.resolve(), folder)
    if len(folders) > MOST:
        raise InputError(f"{len(folders)} runs, expected {MOST} at most")
    return [read_run(folder, say) for folder in folders.values()]


def _folders(place: Path, say: Callable[[str], None]) -> list[Path]:
    if is_there(place / "config.json"):
        return [place]
    runs = place / "runs"
    try:
        inside = sorted(runs.iterdir()) if runs.is_dir() and not runs.is_symlink() else []
    except OSError as error:
        raise Place(runs).wrong(f"cannot be read: {error.strerror}") from error
    inside = [folder for folder in inside if not folder.name.startswith(".")]
    for link in filter(Path.is_symlink, inside):
        raise Place(link).wrong("is a link, expected a run's folder")
    inside = [folder for folder in inside if folder.is_dir()]
    found = [folder for folder in inside if is_there(folder / "config.json")]
    for folder in inside:
        if folder not in found:
            say(f"{readable(str(folder))}: no config.json, left out")
    if not found:
        raise Place(place).wrong("expected a run's folder, with config.json in it, or a comparison's, with runs/")
    return found


def read_run(folder: Path, say: Callable[[str], None]) -> Run:
    """What stands in a run's folder; nothing that it names is opened or run."""
    place = Place(folder / "config.json")
    values = _sealed(folder, "config.json")
    began = {name: values.pop(name, None) for name in ("code", "origin", "processes")}
    settings = _settings(values, place)
    summary = _sealed(folder, SUMMARY) if is_there(folder / SUMMARY) else {}
    _check_files(folder, summary)
    figures = {who: _figures(summary, who, Place(folder / SUMMARY)) for who in WHO if summary.get(who) is not None}
    path = folder / "samples.jsonl"
    return Run(folder, settings, began, _steps(folder, say), figures, index_of(path) if is_there(path) else {})


def _sealed(folder: Path, name: str) -> dict[str, Any]:
    check_regular(folder / name, LONGEST_FILE)
    try:
        return read_sealed(folder / name)
    except Damaged as error:
        raise InputError(f"{readable(str(folder))}: {readable(str(error))}") from error


def _check_files(folder: Path, summary: dict[str, Any]) -> None:
    """Raises InputError unless the files that are read are those that the summary was written for."""
    files = summary.get("files", {})
    if type(files) is not dict:
        raise Place(folder / SUMMARY).wrong(f"files is {shown(files)}, expected an object")
    read = [name for name in ("metrics.jsonl", "samples.jsonl") if name in files]
    for name in read:
        check_regular(folder / name, LONGEST_LINES)  # before it is read whole
    try:
        check_digests(folder, {name: files[name] for name in read})
    except Damaged as error:
        again = "if the training goes on, wait for its end, which is written anew"
        raise InputError(f"{readable(str(folder))}: {readable(str(error))}; {again}") from error


def _settings(values: dict[str, Any], place: Place) -> dict[str, Any]:
    """The settings, of which those that a page reads have the types that they have in TrainConfig."""
    for name in ("method", "recipe", "kind", "algorithm", "cost", "task", "dataset"):
        of_type(values, name, str, place)
    of_type(values, "seed", int, place)
    of_type(values, "budget_per_token", bool, place)
    of_type(values, "teacher_budgets", list, place)
    budget = number(values, "budget", place)
    if budget is None or budget < LEAST_BUDGET:
        raise place.wrong(f"budget is {shown(budget)}, expected a number of nats from {LEAST_BUDGET:g}")
    return {**values, "budget": budget}


def _figures(summary: dict[str, Any], who: str, place: Place) -> Figures:
    values = of_type(summary, who, dict, place)
    figures = {name: as_number(value, f"{who}.{name}", place) for name, value in values.items()}
    return {name: value for name, value in figures.items() if value is not None}


def _steps(folder: Path, say: Callable[[str], None]) -> tuple[Step, ...]:
    """The steps of `metrics.jsonl`. A last line without an end is what a kill has left: it is dropped, and that is
    said."""
    path = folder / "metrics.jsonl"
    if not is_there(path):
        return ()
    names = ("reward", "cmdp/cumulative_kl")
    return tuple(Step(*(number(line.values, name, line.place) for name in names)) for line in tables(path, say))
