"""How the trainings of a comparison are run: some at a time, each in a process of its own with its own log."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from cmdp_fast.digest import Damaged
from cmdp_fast.errors import readable
from cmdp_fast.files import writing

from ..records.ending import finished_summary
from ..records.lock import alone_in
from ..records.report import Report
from ..settings.config import TrainConfig
from .warm import trainings


def jobs_of(asked: int) -> int:
    """How many trainings run at a time; 0 was asked for one per processor, or one where there is a GPU."""
    return asked or (1 if torch.cuda.is_available() else os.cpu_count() or 1)


def run_all(
    todo: Sequence[TrainConfig], jobs: int, logs: Path, lock: int, report: Report
) -> Iterator[tuple[TrainConfig, str]]:
    """Runs some at a time; yields each when it has ended, with why it failed ("": it has not)."""
    if not todo:
        return
    logs.mkdir(exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    waiting = list(todo[::-1])
    running: dict[str, TrainConfig] = {}
    ended = 0
    with trainings(threads, lock, logs / "start.log", warm=not torch.cuda.is_available()) as processes:
        try:
            for _ in report.track(todo, f"running {len(todo)}"):
                while waiting and len(running) < jobs:
                    config = waiting.pop()
                    processes.start(config.name, config, logs / f"{config.name}.log")
                    running[config.name] = config
                if not ended:
                    report.status(f"{next(iter(running))} runs")
                name, code = processes.ended()
                ended += 1
                config = running.pop(name)
                failure = _failure(config, code, logs / f"{name}.log")
                report.status(f"{name} {'FAILED' if failure else 'done'}")
                yield config, failure
        except KeyboardInterrupt:
            report.say(
                f"interrupted after {ended} of {len(todo)}: what is running ends its step first (again: at once); the "
                "same command goes on with what is missing"
            )
            raise


def _failure(config: TrainConfig, code: int, log: Path) -> str:
    """Why a training that has ended with this exit code has failed; empty if it has not."""
    try:
        if not code and finished_summary(Path(config.output_dir) / config.name) is not None:
            return ""
    except Damaged as error:
        return str(error)
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    return f"exit code {code}: {readable(last.strip())}"


def remove(folder: Path, report: Report) -> None:
    """Removes the folder of a run. Raises InputError if another process is going on with it."""
    if folder.is_dir():
        with alone_in(folder, report.say), writing(folder):
            shutil.rmtree(folder)
