"""From a recipe, a method and the command line to a configuration.

Precedence, lowest first: the defaults of `TrainConfig`, the recipe (models, task, budget), the method (what is done
about the budget), the command line. With `--resume` the run's own configuration takes the place of all but the last,
where code that it names has to be named again (`trust.py`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from ..errors import InputError, first_line
from .config import TrainConfig, check_choices
from .resume import check_changes, read_config
from .settings import typed
from .trust import check_named_again, check_unchanged, without_code

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent / "recipes"
METHODS = RECIPES / "methods"


def read_recipe(name: str, method: str = "") -> TrainConfig:
    """The configuration in a recipe, changed by a method; each is one of the package by name or a TOML file by path.

    Without a method it is the one that the recipe names, if it does. Raises InputError for a file that is not there or
    not valid, and for settings that do not exist or have the wrong type.
    """
    values = _read("recipe", name, RECIPES)
    method = method or values.get("method", "")
    if method:
        values |= _read("method", method, METHODS) | {"method": method}
    config = TrainConfig(**{**values, "recipe": name})
    check_choices(config)
    return config


def _read(option: str, name: Any, folder: Path) -> dict[str, Any]:
    """The settings in a TOML file, as the types that TrainConfig has."""
    path = Path(name) if str(name).endswith(".toml") else folder / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.toml")))
        raise InputError(f"--{option} {name}: neither a TOML file nor one of the package's {option}s ({known})")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--{option} {name}: not valid TOML: {first_line(error)}") from error
    return typed(values, f"--{option} {name}")


Config = TypeVar("Config", bound=TrainConfig)


def parse(args: Sequence[str], prog: str = "cmdp-fast train") -> TrainConfig:
    """The configuration of a training that the command line asks for; see `parse_as`."""
    return parse_as(TrainConfig, args, prog, "Distil a student from a teacher under a budget of divergence, with PPO.")


def parse_as(kind: type[Config], args: Sequence[str], prog: str, description: str) -> Config:
    """The configuration that the command line asks for, validated.

    Raises InputError for what cannot work; tyro itself exits with code 2 on options that do not exist.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="quickstart")
    first.add_argument("--method", default="")
    first.add_argument("--resume", default="")
    base, _ = first.parse_known_args(list(args))
    if not base.resume:
        default = kind(**vars(read_recipe(base.recipe, base.method)))
        config = tyro.cli(kind, prog=prog, description=description, default=default, args=list(args))
        config.validate()
        return config
    began, code = read_config(Path(base.resume))
    default = kind(**vars(without_code(began)))
    config = tyro.cli(kind, prog=prog, description=description, default=default, args=list(args))
    check_named_again(began, config, [*prog.split(), *args])
    config.validate()
    check_changes(began, config)
    check_unchanged(config, code)
    return config
