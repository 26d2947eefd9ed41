"""Whose code runs: that which the command line names. A run's folder names code too, and does not have it run.

A run records the sha256 of the files that its functions are in. To go on with it, its code is named again with the same
options, and the files must be those of the beginning. A function's own file is compared, not what that file imports,
and nothing of a model's code.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .config import TrainConfig
from .digest import sha256
from .errors import InputError, first_line
from .imports import source_file
from .settings import words

CODE = (
    "rewards",
    "step_verifier",
    "rollout",
    "trust_remote_code",
    "unisolated_judges",
)  # the settings that can let code run


def without_code(config: TrainConfig) -> TrainConfig:
    """The configuration with the defaults of `TrainConfig` for the settings that let code run."""
    return replace(config, **{name: getattr(TrainConfig, name) for name in _naming_code(config)})


def code_of(config: TrainConfig) -> dict[str, str]:
    """The sha256 of the file of each function that the configuration names; "" where Python itself brings it.

    Nothing of them is run. Raises InputError if one is not there.
    """
    return {spec: _sha256(name, spec) for name in CODE for spec in _functions(getattr(config, name))}


def check_named_again(began: TrainConfig, now: TrainConfig, command: Sequence[str]) -> None:
    """Raises InputError if a run's folder names code that the `command` does not; the message has the one that does."""
    missing = [name for name in _naming_code(began) if getattr(now, name) == getattr(TrainConfig, name)]
    if missing:
        named = [word for name in missing for word in words(name, getattr(began, name))]
        if not all(map(str.isprintable, named)):
            raise InputError(f"--resume {now.resume}: its {missing[0]} cannot be typed: {named!r}")
        raise InputError(
            f"--resume {now.resume} would run code that its folder names, which is up to you. If you have read and "
            f"trust it: {shlex.join([*command, *named])}"
        )


def check_unchanged(now: TrainConfig, recorded: dict[str, str]) -> None:
    """Raises InputError if a function that a run's configuration names is in another file than at its beginning."""
    for name in CODE:
        for spec in _functions(getattr(now, name)):
            found, expected = _sha256(name, spec), recorded.get(spec)
            if found != expected:
                raise InputError(
                    f"--{name.replace('_', '-')} {spec}: {source_file(spec) or 'its module'} is not the file that "
                    f"{now.resume} began with (sha256 {found or 'none'}, recorded {expected or 'none'}): put that file "
                    "back, or begin another run"
                )


def _naming_code(config: TrainConfig) -> list[str]:
    return [name for name in CODE if getattr(config, name) is True or _functions(getattr(config, name))]


def _functions(value: Any) -> list[str]:
    """The functions of the user's among a setting's values: what is built in has no colon."""
    if isinstance(value, bool):
        return []
    return [spec for spec in ((value,) if isinstance(value, str) else value) if ":" in spec]


def _sha256(name: str, spec: str) -> str:
    try:
        path = source_file(spec)
        return sha256(path) if path else ""
    except (ImportError, OSError, ValueError) as error:
        raise InputError(f"--{name.replace('_', '-')} {spec}: {first_line(error)}") from error
