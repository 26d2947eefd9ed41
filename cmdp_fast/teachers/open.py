"""Teachers by their names: `served:http://127.0.0.1:8765`, `served:unix:/run/teacher.sock`, `vllm:http://10.0.0.2:8000`,
`cached:FOLDER`."""

from __future__ import annotations

from importlib import import_module

from cmdp_fast.errors import InputError

from .teacher import Asking, Teacher

KINDS = {
    "served": "served:ServedTeacher",
    "vllm": "on_vllm:TeacherOnVLLM",
    "cached": "cached:CachedTeacher",
}
"""By the beginning of a name: module and class, which has a class method ``open(place, asking)``."""


def is_asked(name: str) -> bool:
    """Whether a name is that of a teacher that is asked, rather than of a folder or a hub's model that is loaded."""
    return name.partition(":")[0] in KINDS


def open_teacher(name: str, asking: Asking = Asking()) -> Teacher:  # noqa: B008  # frozen
    """The teacher of a name. Raises InputError, which says the name, if it is not there or cannot be used."""
    kind, _, place = name.partition(":")
    if kind not in KINDS or not place:
        known = ", ".join(f"{each}:…" for each in KINDS)
        raise InputError(f"{name} names no teacher that can be asked: expected one of {known}")
    module, _, class_name = KINDS[kind].partition(":")
    found: type[Teacher] = getattr(import_module(f"{__package__}.{module}"), class_name)
    return found.open(place, asking)
