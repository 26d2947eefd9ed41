"""Settings as values out of a file, checked, and as words of a command line."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, get_args, get_type_hints

from cmdp_fast.errors import InputError, first_line, shown
from cmdp_fast.nearest import did_you_mean

from .config import TrainConfig


def typed(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Settings as the types that TrainConfig has. Raises InputError, which names the source, for those it has not."""
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    kinds = get_type_hints(TrainConfig)
    for key, value in values.items():
        if key not in fields:
            raise InputError(f"{source}: there is no setting named {key!r}{did_you_mean(key, fields)}")
        default = fields[key].default
        expected = dict if default is dataclasses.MISSING else type(default)
        if isinstance(default, tuple) and isinstance(value, (list, tuple)):
            kind = type(default[0]) if default else get_args(kinds[key])[0]
            values[key] = value = tuple(_float(item) if (kind, type(item)) == (float, int) else item for item in value)
            if any(type(item) is not kind for item in value):
                raise InputError(f"{source}: {key} must be a list of {kind.__name__}, not {shown(list(value))}")
        elif isinstance(default, float) and type(value) is int:
            values[key] = value = _float(value)
        if type(value) is not expected:
            kind_of = {"tuple": "a list", "dict": "a table"}.get(expected.__name__, expected.__name__)
            raise InputError(f"{source}: {key} must be {kind_of}, not {shown(value)}")
        for text in (value,) if expected is str else value if expected is tuple else ():
            if isinstance(text, str) and not _is_unicode(text):
                raise InputError(f"{source}: {key} must be valid Unicode, not {text!r}")
        if expected is dict:
            _check_json(value, f"{source}: {key}")
    return values


def _is_unicode(text: str) -> bool:
    """Whether a text can be a name of a file, or stand in one."""
    try:
        text.encode("utf-8", "surrogateescape")  # as Python has names of files that are not in UTF-8
    except UnicodeEncodeError:
        return False
    return True


def _float(value: int) -> float:
    """Infinite where no float is as large: no setting may be."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _check_json(value: dict[str, Any], source: str) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{source} must be a table of what JSON has, not {shown(value)}: {first_line(error)}"
        ) from error


def words(name: str, value: Any) -> list[str]:
    """The words that give a setting this value."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    if isinstance(value, tuple):
        return [f"--{option}", *map(str, value)]
    return [f"--{option}={json.dumps(value) if isinstance(value, dict) else value}"]
