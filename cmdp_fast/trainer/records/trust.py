"""Code runs that the command line names. A run's folder names code too, and does not have it run.

A run records the sha256 of the files that its functions are in. To go on with it, its code is named again with the same
options, and the files must be those of the beginning. A function's own file is compared, and those of the packages that
it is in, but not the files that these import, nor a model's code.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cmdp_fast.digest import sha256
from cmdp_fast.errors import InputError, first_line
from cmdp_fast.imports import source_files

from ..settings.config import TrainConfig
from ..settings.values import words

# The settings that can let code run.
CODE = ("rewards", "step_verifier", "rollout", "trust_remote_code", "unisolated_judges")
# Those that name programs, and where a run's prompts, weights and figures go.
PLACES = (
    *("rollout_python", "rollout_args", "rollout_url", "rollout_teacher_url", "rollout_folder"),
    *("teacher_token_file", "trackers"),
)


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
    typed = {word.partition("=")[0].replace("_", "-") for word in command}
    missing = [name for name in _naming_code(began) if getattr(now, name) == getattr(TrainConfig, name)]
    # Another place may be typed, the default one too; and an evaluation has no trackers.
    missing = [name for name in missing if name not in PLACES or f"--{name.replace('_', '-')}" not in typed]
    missing = [name for name in missing if now.TRAINS or name != "trackers"]
    if missing:
        named = [word for name in missing for word in words(name, getattr(began, name))]
        if not all(map(str.isprintable, named)):
            raise InputError(f"--resume {now.resume}: its {missing[0]} cannot be typed: {named!r}")
        raise InputError(
            f"--resume {now.resume} would run code, or ask servers or trackers, that its folder names, which is up to "
            f"you. If you have read and trust it: {shlex.join([*command, *named])}"
        )


def check_unchanged(now: TrainConfig, recorded: dict[str, str]) -> None:
    """Raises InputError if a function that a run's configuration names is in another file than at its beginning."""
    for name in CODE:
        for spec in _functions(getattr(now, name)):
            present, expected = _sha256(name, spec), recorded.get(spec)
            if present != expected:
                file, *above = [*map(str, source_files(spec)[::-1])] or ["its module"]
                of = ", or a package that it is in has changed" if above else ""
                raise InputError(
                    f"--{name.replace('_', '-')} {spec}: {file} is not the file that {now.resume} began with{of} "
                    f"(sha256 {present or 'none'}, recorded {expected or 'none'}): put that back, or begin another run"
                )


def _naming_code(config: TrainConfig) -> list[str]:
    code = [name for name in CODE if getattr(config, name) is True or _functions(getattr(config, name))]
    on_disk = config.teacher.startswith("cached:")  # which is read, as other teachers' folders are
    asked = ["teacher"] if config.asks_teacher and not on_disk else []
    return code + asked + [name for name in PLACES if getattr(config, name) not in (getattr(TrainConfig, name), ())]


def _functions(value: Any) -> list[str]:
    """The functions of the user's among a setting's values: a built-in one has no colon."""
    if isinstance(value, bool):
        return []
    return [spec for spec in ((value,) if isinstance(value, str) else value) if ":" in spec]


def _sha256(name: str, spec: str) -> str:
    try:
        digests = [sha256(path) for path in source_files(spec)]
        above, own = "".join(digests[:-1]), digests[-1] if digests else ""
        return hashlib.sha256(f"{above}{own}".encode()).hexdigest() if above else own
    except (ImportError, OSError, ValueError) as error:
        raise InputError(f"--{name.replace('_', '-')} {spec}: {first_line(error)}") from error
