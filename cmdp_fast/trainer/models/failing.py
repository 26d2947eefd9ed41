"""What is said of a model that fails as it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cmdp_fast.errors import InputError, first_line, readable
from cmdp_fast.teachers.in_process import TeacherInProcess

from ..distributed import of_others

OF_THE_MACHINE = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))


@contextmanager
def failing_in_a_line(role: str, name: str, model: Any) -> Iterator[None]:
    """Has an error of a model that somebody else has described be an InputError; not one of the machine that it is on,
    or of other processes."""
    try:
        yield
    except (InputError, *OF_THE_MACHINE):
        raise
    except Exception as error:
        if of_others(error):
            raise
        raise InputError(
            f"--{role} {name} cannot be used: {type(model).__name__} fails at a first token, with "
            f"{type(error).__name__}: {readable(first_line(error))}; a field of its config.json may be the reason"
        ) from error


def in_process(
    model: Any, tokenizer: Any, name: str, revision: str = "", ends: tuple[int, ...] = ()
) -> TeacherInProcess:
    """A teacher that is asked in this process, where it is now, that has answered. Raises InputError if it cannot."""
    with failing_in_a_line("teacher", name, model):
        teacher = TeacherInProcess(model, tokenizer, name, revision, ends)
        teacher.answer([[0, 0]], [1])
    return teacher
