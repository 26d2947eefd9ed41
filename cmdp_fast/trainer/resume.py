"""Going on with a run that stopped: its configuration, and what of it may be changed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .errors import InputError, first_line
from .state import checkpoints

CHANGEABLE = ("resume", "dry_run", "steps", "checkpoint_every", "eval_every", "trackers")


def read_config(run: Path) -> TrainConfig:
    """The configuration that a run began with. Raises InputError if the folder holds none."""
    values = _read(run / "config.json")
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    unknown = values.keys() - fields.keys()
    if unknown:
        raise InputError(f"{run / 'config.json'}: there is no setting named {sorted(unknown)[0]!r} in this version")
    for name, value in values.items():
        if isinstance(value, list) and isinstance(fields[name].default, tuple):
            values[name] = tuple(value)
    return TrainConfig(**values)


def check_changes(before: TrainConfig, now: TrainConfig) -> None:
    """Raises InputError if a run would go on as another one than it began."""
    for field in dataclasses.fields(TrainConfig):
        old, new = getattr(before, field.name), getattr(now, field.name)
        if old != new and field.name not in CHANGEABLE:
            raise InputError(
                f"--{field.name.replace('_', '-')} {new}: {now.resume} began with {old}, and a run goes on as it began"
            )
    if before.steps != now.steps and now.lr_schedule != "constant":
        raise InputError(
            f"--steps {now.steps}: the {now.lr_schedule} learning rate of {now.resume} was laid out over {before.steps}"
        )


def is_finished(config: TrainConfig) -> bool:
    """Whether the run to be resumed has nothing left to do. Raises InputError if it has done more than it should, or
    has come to an end of some kind without leaving a checkpoint."""
    run = Path(config.resume)
    path = run / "summary.json"
    if not path.is_file():
        return False
    summary = _read(path)
    if summary["steps"] > config.steps:
        raise InputError(f"--steps {config.steps}: {config.resume} has {summary['steps']} behind it")
    if summary["steps"] == config.steps and summary["student_after"] is not None:
        return True
    if not checkpoints(run):
        raise InputError(f"--resume {run}: it left no checkpoint to go on from")
    return False


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--resume {path.parent}: no run that can be resumed: {first_line(error)}") from error
