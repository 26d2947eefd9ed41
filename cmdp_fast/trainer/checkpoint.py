"""The files of a run: a folder that nobody else has, and contents that appear whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:  # it needs tyro, which who only writes files does not
    from .config import TrainConfig


def check_run_folder(config: TrainConfig) -> None:
    """Raises InputError if the run was given a name that is taken."""
    folder = Path(config.output_dir) / config.run_name
    if config.name and folder.exists():
        raise InputError(f"{folder} exists: choose another --name, or remove it")


def make_run_folder(config: TrainConfig) -> Path:
    """A new folder for the run. Without --name it is the recipe's name, followed by the first number that is free."""
    parent = Path(config.output_dir)
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = parent / (config.run_name if number == 1 else f"{config.run_name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            check_run_folder(config)
            number += 1


def save_student(student: Any, tokenizer: Any, folder: Path) -> None:
    """Puts the student with its tokenizer into `folder/student`, in place of an earlier one once it is complete."""
    target, part, old = (folder / name for name in ("student", ".student.part", ".student.old"))
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    student.save_pretrained(part)
    tokenizer.save_pretrained(part)
    if target.exists():
        os.rename(target, old)
    os.rename(part, target)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file that replaces an earlier one once it is complete."""
    part = path.with_name(f".{path.name}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """The same for JSON."""
    write_text(path, as_json(value, indent=2) + "\n")


def write_samples(path: Path, samples: dict[str, list[dict[str, Any]]]) -> None:
    """JSON lines: every sample of each policy, by whom it is."""
    write_text(path, "".join(as_json({"who": who, **s}) + "\n" for who, some in samples.items() for s in some))


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader accepts: a number that is not finite becomes null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
