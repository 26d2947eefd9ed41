"""A line of the doctor: how it is, of what, and what to do."""

from __future__ import annotations

from typing import NamedTuple

from cmdp_fast import masking
from cmdp_fast.errors import first_line, readable, without_controls
from cmdp_fast.terminal import wrapped

OK, NOTE, PROBLEM = "ok", "note", "problem"
_INDENT = 9


class Row(NamedTuple):
    """How a thing is: ok, worth a note, or a problem; with the cure, if there is one."""

    level: str
    what: str
    says: str
    cure: str = ""


def lines(row: Row, width: int | None) -> list[str]:
    """The lines of a row, wrapped to a width or (None) as they are; a cure has one of its own, whole, to be copied."""
    said = public(f"{row.what}: {row.says}")
    first = row.level.ljust(_INDENT)
    head = wrapped(said, width, first) if width else [first + said]
    return [*head, *([f"{'':{_INDENT}}cure: {public(row.cure)}"] if row.cure else [])]


def failed(error: Exception) -> str:
    """What was raised, in one line."""
    return readable(f"{type(error).__name__}: {first_line(error)}")


def public(text: str) -> str:
    """A text in one line that may stand in public once somebody has looked through it, see masking.py."""
    return masking.public(" ".join(without_controls(text).split()))
