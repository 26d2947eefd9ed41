"""The one exception that the command line turns into one line on stderr and exit code 2."""

from __future__ import annotations

import re
from typing import Any


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what was given and what was expected."""


class Interrupted(KeyboardInterrupt):
    """An interrupt whose consequences the user has been told of already."""


class ProcessLost(InputError):
    """Another process of the run has gone, or cannot be reached: from here on nothing can be agreed on with others."""


class ProcessAlone(ProcessLost):
    """This process of several cannot go on, and the others, which may wait for it, do not know why: it says so."""


# Of ASCII and Latin-1; what ends a line for some readers; what turns the direction of writing.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def without_controls(text: str) -> str:
    """The text without what a terminal obeys (tabs and line ends stay), or what turns the direction of writing: others
    may have written parts of it."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def readable(text: str, most: int = 300) -> str:
    """A message that a completion may have written, fit for a terminal, a log and a file: short, one line, no control
    codes, nothing that turns the direction of writing, and no half of a character."""
    short = text if len(text) <= most else f"{text[:most]}..."
    return "".join(c if c.isprintable() else "?" for c in short)


def shown(value: Any) -> str:
    """What a value looks like, fit for a message as `readable` says; somebody else's may be one that cannot be
    printed."""
    try:
        text = repr(value)
    except KeyboardInterrupt:
        raise
    except BaseException:  # its text is made by code that is not ours, and the message is of something else
        text = f"<{kind_of(value)}>"
    return readable(text, 200)


def kind_of(value: Any) -> str:
    """The name of a value's type, fit for a message."""
    return readable(type(value).__name__, 100)


def root_cause(error: BaseException) -> BaseException:
    """The error that others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def first_line(error: BaseException) -> str:
    """The first line of an error raised by code that is not ours, to be quoted inside one of ours."""
    try:
        lines = str.splitlines(str.strip(str(error)))
    except KeyboardInterrupt:
        raise
    except BaseException:  # its text is made by code that is not ours, and what that raises would hide the error itself
        lines = []
    return lines[0] if lines else kind_of(error)
