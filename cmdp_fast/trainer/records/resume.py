"""Going on with a run that stopped: its configuration, and the settings of it that may be changed."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cmdp_fast.digest import Damaged, read_sealed
from cmdp_fast.errors import InputError, readable, shown

from ..settings.config import TrainConfig
from ..settings.values import typed
from .checkpoint import checkpoints
from .ending import finished_summary

CHANGEABLE = (
    *("resume", "dry_run", "steps", "checkpoint_every", "eval_every", "trackers", "save_student_every", "keep"),
    # These change the memory that a step takes: a run that ran out of it can go on. Its figures change by rounding, and
    # with `rollout_batch_size` other random numbers meet other prompts, which is as good a sample.
    *("micro_batch_size", "micro_batch_tokens", "rollout_batch_size", "padding_free", "attn_implementation"),
    # Where the servers of the rollouts are, and how they are started
    *("rollout_url", "rollout_teacher_url", "rollout_python", "rollout_args", "rollout_devices", "rollout_folder"),
    *("rollout_transfer", "rollout_timeout", "rollout_tolerance"),
    *("teacher_timeout", "teacher_token_file", "reward_timeout"),
    *("gradient_checkpointing", "teacher_cache_mb", "teacher_cache_cpu", "teacher_device", "offload_optimizer"),
)


class Begun(NamedTuple):
    """What a run began with: its settings, the sha256 of the code that they name, and the number of its processes
    (None: an earlier version of this package began it)."""

    config: TrainConfig
    code: dict[str, str]
    processes: int | None


def read_config(run: Path) -> Begun:
    """What stands in a run's `config.json`.

    Nothing that stands there is run. Raises InputError if the folder holds none, or one that cannot be used.
    """
    _check_links(run)
    try:
        values = read_sealed(run / "config.json")
    except Damaged as error:
        raise InputError(f"--resume {run}: no run that can be resumed: {error}") from error
    code, _, processes = (values.pop(name, None) for name in ("code", "origin", "processes"))
    if not isinstance(code, dict):
        raise InputError(f"--resume {run}: no run that can be resumed: config.json lacks the sha256 of its code")
    if processes is not None and (type(processes) is not int or processes < 1):
        raise InputError(f"--resume {run}: no run that can be resumed: config.json has {shown(processes)} processes")
    source = str(run / "config.json")
    config = TrainConfig(**typed(values, source))
    try:
        config.validate()
    except InputError as error:
        raise InputError(f"{source}: {readable(str(error), 600)}") from error
    return Begun(config, code, processes)


def spread_again(began: TrainConfig, before: int, now: int) -> TrainConfig:
    """The configuration of the same run in another number of processes: of the same problems in each step, and of as
    many optimizer steps. Raises InputError if the problems do not divide, or the completions into as many steps."""
    prompts = began.prompts_per_step * before
    if prompts % now:
        raise InputError(
            f"the run takes {prompts} prompts a step, {began.prompts_per_step} in each of {before}: they do not divide "
            f"by {now} processes"
        )
    config = dataclasses.replace(began, prompts_per_step=prompts // now)
    parts = -(-began.batch_size // began.minibatch_size)
    if -(-config.batch_size // config.minibatch_size) != parts:
        config = dataclasses.replace(config, minibatch_size=-(-config.batch_size // parts))
    if -(-config.batch_size // config.minibatch_size) != parts:
        raise InputError(
            f"the run takes {parts} optimizer steps over the completions of a step: no --minibatch-size makes as many "
            f"of the {config.batch_size} in each of {now} processes"
        )
    return config


def check_changes(before: TrainConfig, now: TrainConfig) -> None:
    """Raises InputError if a run would go on as another one than it began."""
    for field in dataclasses.fields(TrainConfig):
        old, new = getattr(before, field.name), getattr(now, field.name)
        # The same teacher may be asked elsewhere: what it says it is, is compared (`origin.py`)
        elsewhere = field.name == "teacher" and before.asks_teacher and now.asks_teacher
        if old != new and field.name not in CHANGEABLE and not elsewhere:
            raise InputError(
                f"--{field.name.replace('_', '-')} {new}: {now.resume} began with {'nothing' if old == '' else old}, "
                "and a run goes on as it began"
            )
    if before.steps != now.steps and now.lr_schedule != "constant":
        raise InputError(
            f"--steps {now.steps}: the {now.lr_schedule} learning rate of {now.resume} was laid out over {before.steps}"
        )


def is_finished(config: TrainConfig, say: Callable[[str], None]) -> bool:
    """Whether the run to be resumed has nothing left to do; says so if a file of its end has been damaged.

    Raises InputError if it has done more than it should, or has come to an end of some kind without a checkpoint.
    """
    run, damaged = Path(config.resume), ""
    try:
        summary = finished_summary(run)
    except Damaged as error:
        summary, damaged = None, str(error)
    if summary is not None and summary["steps"] > config.steps:
        raise InputError(f"--steps {config.steps}: {config.resume} has {summary['steps']} behind it")
    if summary is not None and summary["steps"] == config.steps:
        return True
    if (summary is not None or damaged) and not checkpoints(run):  # else it stopped before the first, and begins again
        raise InputError(f"--resume {run}: {damaged and f'{damaged}, and '}it left no checkpoint to go on from")
    if damaged:
        say(f"{run}: {damaged}; the end of the run is made again")
    return False


def _check_links(run: Path) -> None:
    """Raises InputError if something in the run's folder is a link: a run must write inside it alone. So for what is
    neither a file nor a folder, such as a pipe. The links that wandb makes lie in its own folder."""
    for parent, folders, files in os.walk(run):
        for name in folders + files:
            mode = os.lstat(Path(parent) / name).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                kind = "a link" if stat.S_ISLNK(mode) else "no file"
                raise InputError(
                    f"--resume {run}: {Path(parent) / name} is {kind}, and a run's folder has no such thing"
                )
        if Path(parent) == run and "wandb" in folders:
            folders.remove("wandb")
