"""The multiplier of `pid`: set by the completions of each step, and kept beside verl's checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from cmdp_fast.constraint import Constraint
from cmdp_fast.digest import opened
from cmdp_fast.errors import InputError, first_line, readable
from cmdp_fast.files import write_json
from cmdp_fast.objective import PIDController

FILE = "cmdp_pid.json"
"""In the folder ``global_step_N`` of a checkpoint, where verl has `data.pt`."""


def priced(constraint: Constraint, controller: PIDController, mean_cost: float) -> Constraint:
    """The constraint with the lambda that follows from the mean cost in nats of a step's completions, which it then
    weighs (`cmdp_fast.pid`). Raises InputError if that mean is not finite."""
    return replace(constraint, coefficient=controller.update(mean_cost, float(constraint.budget)))


def save(controller: PIDController, folder: Path) -> None:
    """Writes the controller's state into the folder of a checkpoint, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, controller.state_dict())


def load(controller: PIDController, folder: Path) -> None:
    """Continues from `save`. Raises InputError where there is no such file or it holds something else."""
    path = folder / FILE
    try:
        with opened(path) as file:
            controller.load_state_dict(json.loads(file.read().decode()))
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} has no {FILE}: it is no checkpoint of algorithm.cmdp.kind=pid, whose lambda has a history"
        ) from error
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is no state of a controller: {readable(first_line(error))}") from error
