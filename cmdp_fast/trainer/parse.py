"""From a recipe, a method and the command line to a configuration.

Precedence, lowest first: the defaults of `TrainConfig`, the recipe (models, task, budget), the method (the way
to deal with the budget), the command line. With `--resume` the run's own configuration takes the place of all but the
last, where code that it names has to be named again (`records/trust.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from cmdp_fast.errors import InputError, readable

from .command_line.parsing import FirstLook, settings_of
from .distributed import of_main, together
from .launch import launched, meet
from .records.resume import Begun, check_changes, read_config, spread_again
from .records.trust import check_named_again, check_unchanged, without_code
from .settings.config import TrainConfig
from .settings.recipe import read_recipe
from .settings.several import with_one_teacher
from .settings.source import check_source
from .settings.unread import changed, check_read

Config = TypeVar("Config", bound=TrainConfig)


def parse(args: Sequence[str], prog: str = "cmdp-fast train") -> TrainConfig:
    """The configuration of a training that the command line asks for; see `parse_as`."""
    return parse_as(TrainConfig, args, prog, "Distil a student from a teacher under a budget of divergence, with PPO.")


def parse_as(kind: type[Config], args: Sequence[str], prog: str, description: str) -> Config:
    """The configuration that the command line asks for, validated.

    Raises InputError for options that do not exist and settings that cannot work.
    """
    args = with_one_teacher(args)
    first = FirstLook(prog)
    first.add_argument("--recipe", default="quickstart")
    first.add_argument("--method", default="")
    first.add_argument("--resume", default="")
    first.add_argument("--fast", action=argparse.BooleanOptionalAction, default=False)
    base, _ = first.parse_known_args(list(args))
    if not base.resume:
        default = kind(**vars(read_recipe(base.recipe, base.method, base.fast)))
        method = base.method and f" with the method {base.method}"
        whose = f"the recipe {base.recipe}{' in its quick form' if base.fast else ''}{method}"
        config = settings_of(kind, args, prog, f"{description} Defaults are those of {readable(whose)}.", default)
        check_source(config, default)
        config.validate()
        if config.TRAINS:
            check_read(config, changed(config, default))
        if not kind.TRAINS or launched() == 1 or config.mixed_precision != "auto":
            return config.resolved()
        return replace(config, mixed_precision=of_main(lambda: config.precision, meet()))
    if not kind.TRAINS or launched() == 1:
        return _going_on(kind, base.resume, args, prog, description, read_config(Path(base.resume)))
    met = meet()
    began = of_main(lambda: read_config(Path(base.resume)), met)  # others may not see the folder
    with together(met):
        return _going_on(kind, base.resume, args, prog, description, began)


def _going_on(kind: type[Config], run: str, args: Sequence[str], prog: str, description: str, read: Begun) -> Config:
    """The configuration of a run that goes on, of whose beginning this was read."""
    began, code, processes = read
    if kind.TRAINS and processes not in (None, here := launched()):
        began = spread_again(began, processes, here)
    default = kind(**vars(without_code(began)))
    if not kind.TRAINS:  # what the run has made, and not what it began with
        default = replace(default, student=str(Path(run) / "student"))
    config = settings_of(kind, args, prog, description, default)
    check_named_again(began, config, [*prog.split(), *args])
    if not (config.TRAINS and config.task and config.dataset):  # one of which is a change, as is said below
        check_source(config, default)
        config.validate()
    if config.TRAINS:
        check_changes(began, config)
    elif config.student == default.student and not Path(config.student).is_dir():
        raise InputError(f"--resume {config.resume}: there is no {config.student}; --student names another")
    check_unchanged(config, code)
    return config
