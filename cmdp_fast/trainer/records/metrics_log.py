"""A line of metrics per step, and the same numbers for the trackers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmdp_fast.digest import Damaged, read_sealed, write_sealed
from cmdp_fast.errors import InputError
from cmdp_fast.files import as_json, sync, write_text, writing

from ..settings.config import TrainConfig
from ..settings.recorded import shared
from .samples import samples_text

if TYPE_CHECKING:
    from accelerate import Accelerator

TRACKERS = "trackers.json"  # the run's names with the trackers that give it one


class MetricsLog:
    """`metrics.jsonl`, a line per step, and the same numbers for the trackers; the main process writes.

    A run that goes on begins with the `steps` and `evaluations` that its checkpoint knows; lines of the file beyond
    them are cut off.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        config: TrainConfig,
        steps: Sequence[dict[str, Any]] = (),
        evaluations: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.steps, self.evaluations = list(steps), list(evaluations)
        self._path = folder / "metrics.jsonl"
        self._accelerator = accelerator
        if accelerator.is_main_process:
            write_text(self._path, "".join(as_json(step) + "\n" for step in self.steps))
            with writing(folder):
                _start_trackers(accelerator, config, folder, len(self.steps))

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics of a training step. Raises InputError if they cannot be written."""
        self.steps.append({"step": step, **metrics})
        if self._accelerator.is_main_process:
            with writing(self._path), open(self._path, "a", encoding="utf-8") as lines:
                lines.write(as_json(self.steps[-1]) + "\n")
            with writing(self._path.parent):
                self._accelerator.log(metrics, step=step)

    def evaluation(self, step: int, result: dict[str, float], samples: Sequence[dict[str, Any]]) -> None:
        """Records an evaluation of the student after so many steps; it has its place in the curves. TensorBoard gets
        the samples as well, as text."""
        self.evaluations.append({"step": step, **result})
        if self._accelerator.is_main_process:
            with writing(self._path.parent):
                self._accelerator.log({f"eval/{name}": value for name, value in result.items()}, step=step)
                text = samples_text([(f"after {step} steps", samples)])
                for tracker in self._accelerator.trackers:
                    if tracker.name == "tensorboard":  # which reads it as Markdown: four spaces keep it as it is
                        tracker.tracker.add_text("samples", textwrap.indent(text, " " * 4), step)

    def close(self) -> None:
        """Has the disk keep the file, and ends the trackers."""
        if self._accelerator.is_main_process:
            with writing(self._path):
                sync(self._path)
                for tracker in self._accelerator.trackers:
                    tracker.finish()
        self._accelerator.trackers.clear()


def check_trackers(config: TrainConfig) -> None:
    """Raises InputError for a tracker whose package is not installed."""
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--trackers {name}: it is not installed (pip install {name})")


def _start_trackers(accelerator: Accelerator, config: TrainConfig, folder: Path, step: int) -> None:
    """The trackers under the run's name, going on with what they have of it after `step` steps.

    TensorBoard forgets its events of later steps. wandb keeps its own, and takes no second figures for these steps.
    """
    from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

    makers = {
        "tensorboard": lambda: TensorBoardTracker("tensorboard", folder, purge_step=step + 1),
        "wandb": lambda: WandBTracker(
            "cmdp_fast", name=folder.name, dir=str(folder), id=_wandb_id(folder, step > 0), resume="allow"
        ),
        "trackio": lambda: TrackioTracker("cmdp_fast", name=folder.name, **({"resume": "allow"} if step else {})),
    }
    accelerator.log_with = [makers[name]() for name in config.trackers]  # the folder did not exist before
    accelerator.init_trackers("cmdp_fast")
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":  # which would make a run of its own of them
            tracker.store_init_configuration(json.loads(as_json(shared(config))))


def _wandb_id(folder: Path, goes_on: bool) -> str:
    """The id by which wandb knows the run: a new one (`WANDB_RUN_ID` if it is set), kept in the run's folder, or the
    one that is kept there.

    Raises InputError if what is kept there is damaged.
    """
    path = folder / TRACKERS
    if goes_on and path.exists():
        try:
            known = read_sealed(path).get("wandb")
            if not isinstance(known, str) or not re.fullmatch(r"[\w.-]{1,128}", known, re.ASCII):
                raise Damaged(f"{TRACKERS} holds no id of wandb's")
        except Damaged as error:
            raise InputError(f"{folder}: {error}; without that file wandb gets a new run") from error
        return known
    new = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(8)
    write_sealed(path, {"wandb": new})
    return new
