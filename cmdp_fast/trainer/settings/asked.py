"""Which settings go with a teacher that is asked."""

from __future__ import annotations

from cmdp_fast.errors import InputError
from cmdp_fast.teachers.open import is_asked

from ..methods import METHODS
from .models import ModelSettings


def is_served(name: str) -> bool:
    """Whether a server answers, and not a folder of stored answers."""
    return is_asked(name) and not name.startswith("cached:")


def check_teacher(settings: ModelSettings, algorithm: str, samples_teacher: str, trains: bool) -> None:
    """Raises InputError for a teacher that is asked where it would have to be sampled, and for settings of the one kind
    of teacher with the other; nothing is asked.

    ``samples_teacher`` says what a training samples of the teacher: "" nothing, "mixture", or "text", which one on disk
    has stored.
    """
    name = settings.teacher
    if not is_served(name):
        for option in ("teacher_token_file", "teacher_wire"):
            if getattr(settings, option):
                flag = option.replace("_", "-")
                raise InputError(f"--{flag} is for a teacher on a server, not for --teacher {name}")
    if settings.teacher_device == "cpu" and samples_teacher:
        raise InputError(f"--teacher-device cpu: a teacher there is asked, and --algorithm {algorithm} samples it")
    if not is_asked(name):
        return
    for option in ("teacher_device", "teacher_quantization"):
        if value := getattr(settings, option):
            flag = option.replace("_", "-")
            raise InputError(f"--{flag} {value}: --teacher {name} is not loaded here, it is asked")
    if name.startswith("cached:") and not (trains and METHODS[algorithm].stored):
        stored = " or ".join(each for each, entry in METHODS.items() if entry.stored)
        raise InputError(
            f"--teacher {name} answers for the completions alone that it has stored: it is for a training with "
            f"--algorithm {stored}"
        )
    if samples_teacher == "mixture":
        raise InputError(f"--teacher {name} cannot be sampled: {algorithm} needs --teacher-mix 0 with it")
    if samples_teacher == "text" and not name.startswith("cached:"):
        raise InputError(
            f"--teacher {name} cannot be sampled, and --algorithm {algorithm} learns from the teacher's text: store "
            "that with cmdp-fast cache-teacher, for --teacher cached:FOLDER"
        )
