"""A recipe (models, task, budget) and a method (the way to deal with the budget), read from their TOML files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from cmdp_fast.errors import InputError, first_line, shown
from cmdp_fast.nearest import did_you_mean

from .config import TrainConfig, check_choices
from .values import typed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent.parent / "recipes"
METHOD_FILES = RECIPES / "methods"
LONGEST = 1 << 20  # bytes of a TOML file
POINTS = 200  # in one of its lines
NOT_TOML = (ValueError, RecursionError)  # tomllib's own error is a ValueError; so is that of a number of 5000 digits


def read_recipe(name: str, method: str = "", fast: bool = False) -> TrainConfig:
    """The configuration in a recipe, changed by a method; each is one of the package by name or a TOML file by path.

    Without a method it is the one that the recipe names, if it does. ``fast``: with the settings of the recipe's table
    of that name over its own. Raises InputError for a file that is not there or not valid, for settings that do not
    exist or have the wrong type, and for ``fast`` where there is no such table.
    """
    values = _read("recipe", name, RECIPES)
    quick = values.pop("fast", None)
    if fast and quick is None:
        raise InputError(f"--fast: the recipe {name} has no [fast] table")
    values |= {**quick, "fast": True} if fast and quick else {}
    _check_own("recipe", name, values, "recipe", "resume", "random_weights")
    method = method or values.get("method", "")
    if method:
        own = _read("method", method, METHOD_FILES)
        _check_own("method", method, own, "recipe", "resume", "random_weights", "method", "fast")
        values |= own | {"method": method}
    config = TrainConfig(**{**values, "recipe": name})
    check_choices(config)
    return config


def _check_own(option: str, name: str, values: dict[str, Any], *others: str) -> None:
    for other in others:
        if other in values:
            raise InputError(f"--{option} {name}: {other} is for the command line, a {option} cannot set it")


def _read(option: str, name: Any, folder: Path) -> dict[str, Any]:
    """The settings in a TOML file, as the types that TrainConfig has; those of a recipe's table `fast` in a dict."""
    path = Path(name) if str(name).endswith(".toml") else folder / f"{name}.toml"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.toml"))
        raise InputError(
            f"--{option} {name}: neither a TOML file nor one of the package's {option}s ({', '.join(known)})"
            f"{did_you_mean(str(name), known)}"
        )
    source = f"--{option} {name}"
    values = read_toml(path, source)[0]
    quick = values.pop("fast", None) if option == "recipe" else None
    if quick is None:
        return typed(values, source)
    if not isinstance(quick, dict) or not quick:
        raise InputError(f"{source}: fast must be a table of settings, not {shown(quick)}")
    _check_own("recipe", name, quick, "recipe", "resume", "random_weights", "method", "fast")
    return {**typed(values, source), "fast": typed(quick, f"{source} [fast]")}


def read_toml(path: Path, source: str) -> tuple[dict[str, Any], str]:
    """The values of a TOML file, and its text. Raises InputError, which names the source, for one that has none."""
    try:
        with open(path, "rb") as file:
            content = file.read(LONGEST + 1)
        if len(content) > LONGEST:
            raise ValueError(f"it has more than {LONGEST >> 20} MiB")
        text = content.decode().replace("\r\n", "\n")
        if any(
            line.count(".") > POINTS for line in text.split("\n")
        ):  # tables in tables, for which tomllib takes hours
            raise ValueError(f"a line has more than {POINTS} points")
        return tomllib.loads(text), text
    except (*NOT_TOML, OSError) as error:
        raise InputError(f"{source}: not valid TOML: {first_line(error)}") from error
