"""The folder of a run: a name of its own, and in `config.json` the settings with which the run began."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from cmdp_fast.digest import write_sealed
from cmdp_fast.errors import InputError, readable
from cmdp_fast.files import (
    HOUR,
    SCRATCH,
    as_json,
    check_encodable,
    check_writable,
    remove_scratch,
    sync,
    sync_folder,
    writing,
)
from cmdp_fast.masking import masked, without_secrets

from ..settings.config import TrainConfig
from ..settings.recorded import recorded
from .lock import alone_in


def check_run_folder(config: TrainConfig) -> None:
    """Raises InputError if the run was given a name that is taken, or a place that cannot be written to. Nothing is
    written into the folder of another run, which may be somebody else's and keeps no new one away."""
    _check_name(config)
    place = ("--resume", config.resume) if config.resume else ("--output-dir", config.output_dir)
    check_encodable(f"{place[1]}{config.run_name}", f"{place[0]} {readable(place[1])}")
    if config.resume:
        check_writable(Path(config.resume), f"--resume {config.resume}")
        run = Path(config.resume).resolve()  # which has changed just now: its time is that file system's clock
        remove_scratch(run.parent, os.stat(run).st_mtime - HOUR)
    else:
        longest = Path(config.output_dir) / f"{config.run_name}-{10**8}"  # no number is larger
        check_writable(longest, f"--output-dir {readable(config.output_dir)}")


def _check_name(config: TrainConfig) -> None:
    folder = Path(config.output_dir) / config.run_name
    if config.name and not config.resume and os.path.lexists(folder):
        raise InputError(f"{folder} exists: choose another --name, or remove it")


class Beginning(NamedTuple):
    """What `config.json` holds beside the settings: the sha256 of the code that they name (`trust.py`), digests of what
    they name beside it (`origin.py`), and the number of processes that take a step."""

    code: dict[str, str]
    origin: dict[str, str]
    processes: int


def make_run_folder(config: TrainConfig, began: Beginning, held: ExitStack, say: Callable[[str], None]) -> Path:
    """A new folder for the run, with `config.json` in it and its lock `held` from the moment that it is there.

    Without --name it is the recipe's name, followed by the first number that is free. It is made under a hidden name,
    and a process that is killed meanwhile leaves that, a few bytes that nobody looks at, and that the next run there,
    and the next `--resume`, remove after an hour (`files.remove_scratch`).
    """
    parent = Path(config.output_dir)
    with writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        part = parent / f"{SCRATCH}{secrets.token_hex(4)}"
        part.mkdir()
    try:
        with ExitStack() as lock:
            lock.enter_context(alone_in(part, say))
            write_config(part, config, began)
            with writing(part):
                sync_folder(part)
                folder = _rename(part, parent, config)
                sync(parent)
            held.enter_context(lock.pop_all())
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return folder


def write_config(folder: Path, config: TrainConfig, began: Beginning) -> None:
    """`config.json`: the settings, and what the run has begun with beside them, as they are: `--resume` reads them. The
    file is its owner's alone if something in them looks like a secret."""
    settings = json.loads(as_json({**recorded(replace(config, resume="", dry_run=False)), **began._asdict()}))
    secret = masked(settings, without_secrets) != settings
    write_sealed(folder / "config.json", settings, mode=0o600 if secret else 0o666)


def _rename(part: Path, parent: Path, config: TrainConfig) -> Path:
    number = 1
    while True:
        folder = parent / (config.run_name if number == 1 else f"{config.run_name}-{number}")
        try:
            if os.path.lexists(folder):  # a link to nothing, too
                raise FileExistsError
            os.rename(part, folder)  # fails, too, if somebody else's folder has come there meanwhile
            return folder
        except OSError:
            if not os.path.lexists(folder):
                raise
            _check_name(config)
            number += 1
