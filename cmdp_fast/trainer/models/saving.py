"""Writing the trained student into its run's folder, whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from cmdp_fast.errors import first_line
from cmdp_fast.files import open_as_others, sync, sync_folder, writing

from .adapter import has_adapter, save_adapted


def save_student(
    student: Any, tokenizer: Any, folder: Path, weights: dict[str, Any] | None = None, name: str = "student"
) -> None:
    """Puts the student with its tokenizer into `folder/name`, in place of an earlier one once it is complete.

    `weights` where the model does not hold them all itself. Raises InputError if they cannot be written.
    """
    target, part, old = (folder / each for each in (name, f".{name}.part", f".{name}.old"))
    _clear(target, part, old)
    try:
        with writing(target):
            folder.mkdir(exist_ok=True)
            try:
                if has_adapter(student):
                    save_adapted(student, part, weights)
                else:
                    student.save_pretrained(part, state_dict=weights)
            except OSError:
                raise
            except Exception as error:  # of a library that writes what anybody's files have described
                raise RuntimeError(first_line(error)) from error
            try:
                tokenizer.save_pretrained(part)
            except OSError:
                raise
            except Exception as error:  # its library has no other kind for a full disk
                raise OSError(first_line(error)) from error
            open_as_others(part)
            sync_folder(part)
            if target.exists():
                os.rename(target, old)
            os.rename(part, target)
            sync(folder)
    finally:
        _clear(target, part, old)


def _clear(target: Path, part: Path, old: Path) -> None:
    """Removes the rest of an exchange of folders, and first puts the old one back if it was stopped in between."""
    if old.exists() and not target.exists():
        os.rename(old, target)
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
