"""Teachers by their names: `served:http://127.0.0.1:8765`, `served:unix:/run/teacher.sock`, `vllm:http://10.0.0.2:8000`,
`cached:FOLDER`, `routed:math=served:http://10.0.0.2:8765,code=served:http://10.0.0.3:8765`."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

from cmdp_fast.errors import InputError
from cmdp_fast.vocabulary import check_tokenizers, vocabulary_digest

from .teacher import Asking, Teacher

KINDS = {
    "served": "served:ServedTeacher",
    "vllm": "on_vllm:TeacherOnVLLM",
    "cached": "cached:CachedTeacher",
    "routed": "routed:RoutedTeacher",
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


def check_vocabulary(teacher: Teacher, tokenizer: Any) -> None:
    """Raises InputError unless a token has the same number in the student's tokenizer and in the teacher's, or in that
    of each of several.

    By their digests, and where these differ token by token, as far as the teacher knows its tokens: one of the two may
    have tokens behind the other's last (`check_tokenizers`).
    """
    for each in teacher.each():
        _check_own_vocabulary(each, tokenizer)


def _check_own_vocabulary(teacher: Teacher, tokenizer: Any) -> None:
    ours, theirs = vocabulary_digest(tokenizer), teacher.about.tokenizer
    if ours == theirs:
        return
    digests = f"(sha256 of the student's {ours[:12]}, of the teacher's {theirs[:12]})"
    if (vocabulary := teacher.vocabulary()) is None:
        raise InputError(f"student and teacher must share a tokenizer, but {teacher.about.model} has another {digests}")
    stand_in = SimpleNamespace(get_vocab=lambda: vocabulary)
    if vocabulary_digest(stand_in) != theirs:
        raise InputError(f"the vocabulary of {teacher.about.model} is not the one that it says it has {digests}")
    try:
        check_tokenizers(tokenizer, stand_in)
    except InputError as error:
        raise InputError(f"{error} {digests}") from error
