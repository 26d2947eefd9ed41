"""A comparison's trainings, forked from the test's own process, which has imported everything: they begin at once."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path

import pytest

from cmdp_fast.trainer.comparison import launching, warm
from cmdp_fast.trainer.settings.config import TrainConfig


class Forked:
    """`warm.Trainings` without the process between."""

    def __init__(self) -> None:
        self.running: dict[str, multiprocessing.context.ForkProcess] = {}

    def start(self, name: str, config: TrainConfig, log: Path) -> None:
        def child() -> None:
            with open(log, "w") as file, redirect_stdout(file), redirect_stderr(file):
                code = warm.trained(asdict(config))
            os._exit(code)

        self.running[name] = multiprocessing.get_context("fork").Process(target=child)
        self.running[name].start()

    def ended(self) -> tuple[str, int]:
        while not (over := [name for name, process in self.running.items() if process.exitcode is not None]):
            time.sleep(0.01)
        return over[0], self.running.pop(over[0]).exitcode or 0


@contextmanager
def forking() -> Iterator[None]:
    """Comparisons whose trainings begin at once."""

    @contextmanager
    def trainings(*_: object, **__: object) -> Iterator[Forked]:
        forked = Forked()
        try:
            yield forked
        finally:
            for process in forked.running.values():
                process.terminate()
                process.join()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "trainings", trainings)
        yield
